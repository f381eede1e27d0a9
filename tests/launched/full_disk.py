"""`train.py`, whose disk is full when step KILLED_IN (from 0) is over: from then on no file gets longer than 8 KiB."""

import os
import resource

import train
import transformers.trainer
from transformers import TrainerCallback


class Full(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == int(os.environ["KILLED_IN"]) + 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))


if __name__ == "__main__":
    transformers.trainer.DEFAULT_CALLBACKS.append(Full)
    train.main()
