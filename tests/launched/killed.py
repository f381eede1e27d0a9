"""`train.py`, of whose processes one is killed before the second step."""

import os
import signal

import train
import transformers.trainer
from transformers import TrainerCallback


class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    transformers.trainer.DEFAULT_CALLBACKS.append(Kill)
    train.main()
