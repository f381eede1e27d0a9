"""`train.py`, of whose processes the last one is killed between the backward and the end of step KILLED_IN (from 0)."""

import os
import signal

import on_cpu
import train
import transformers.trainer
from transformers import TrainerCallback


class Kill(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == int(os.environ["KILLED_IN"]) and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP"):
        on_cpu.as_on_gpus()
    transformers.trainer.DEFAULT_CALLBACKS.append(Kill)
    train.main()
