"""
What `Watch` says of a GPU, against what torch says and a clock that waits for it. A failure means wrong numbers in a run's
logs, or a run that waits for the GPU to have them.
"""

import time

import pytest
import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import hf_fpdt
from hf_fpdt import watch
from hf_fpdt.flops import PEAK_BF16
from hf_fpdt.timeline import LANES, read_lanes, read_trace, summary

pytestmark = pytest.mark.gpu
SEQ_LEN, STEPS, LAYERS = 8192, 6, 4


class Rows(Dataset):
    def __init__(self, seq_len=SEQ_LEN):
        self._seq_len = seq_len

    def __len__(self):
        return STEPS

    def __getitem__(self, index):
        ids = (torch.arange(self._seq_len) + index) % 1000
        return {"input_ids": ids, "labels": ids}


class Waiting(TrainerCallback):
    """Seconds between logs, and the peak of all steps, waited for."""

    def __init__(self):
        self.seconds, self._last = [], None

    def _now(self):
        torch.cuda.synchronize()
        now = time.perf_counter()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now

    def on_step_begin(self, args, state, control, **kwargs):
        if self._last is None:
            self._now()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self._now()


def test_logs_of_a_run(tmp_path, monkeypatch):
    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2}
    config = LlamaConfig(**shape, vocab_size=1000, num_hidden_layers=LAYERS, max_position_embeddings=SEQ_LEN)
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16)
    hf_fpdt.apply_fpdt(model, hf_fpdt.FPDTConfig(chunk_size=2048, offload="host", recompute=True))
    name = torch.cuda.get_device_name()
    monkeypatch.setitem(PEAK_BF16, name, PEAK_BF16.get(name, 1e15))
    for event in ("on_step_begin", "on_substep_end", "on_step_end", "on_epoch_end", "on_log"):  # nothing in it may wait
        monkeypatch.setattr(watch.Watch, event, without_waiting(getattr(watch.Watch, event)))
    waiting = Waiting()
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=1, max_steps=STEPS, logging_steps=2, report_to="none", save_strategy="no",
        bf16=True, optim="sgd", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Rows(), callbacks=[waiting])
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    weights = LAYERS * (2 * 512 * 512 + 2 * 512 * 128 + 3 * 512 * 1024) + 512 * 1000
    flops = 6 * weights * SEQ_LEN + LAYERS * 6 * SEQ_LEN * (SEQ_LEN + 1) * 512
    # x, K, V and out in bf16 and lse in fp32, there and back; and the input of the final norm.
    moved = 2 * SEQ_LEN * (LAYERS * (2 * (512 + 2 * 128 + 512) + 4 * 8) + 2 * 512)
    for entry, seconds in zip(logs, waiting.seconds, strict=True):
        assert entry["fpdt/tokens_per_s_per_gpu"] == pytest.approx(2 * SEQ_LEN / seconds, rel=0.1)
        assert entry["fpdt/causal_mfu"] == pytest.approx(2 * flops / seconds / PEAK_BF16[name], rel=0.1)
        assert entry["fpdt/transfer_gib_per_s"] == pytest.approx(2 * moved / 2**30 / seconds, rel=0.1)
        assert torch.cuda.memory_allocated() / 2**30 < entry["fpdt/gpu_peak_gib"] < 8
        assert entry["fpdt/host_gib"] >= moved / 2 / 2**30
        assert 0 <= entry["fpdt/copies_hidden"] <= 1


def train(tmp_path, seq_len, layers, hidden_size, watches, **settings) -> tuple[list, list]:
    """Entries with the loss, and the weights in the end, of four steps with everything on the host."""
    torch.manual_seed(0)
    shape = {"hidden_size": hidden_size, "intermediate_size": 2 * hidden_size, "num_hidden_layers": layers}
    config = LlamaConfig(**shape, num_attention_heads=hidden_size // 64, vocab_size=1000, max_position_embeddings=seq_len)
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16)
    hf_fpdt.apply_fpdt(model, hf_fpdt.FPDTConfig(chunk_size=seq_len // 4, offload="host", recompute=True, **settings))
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=1, max_steps=4, logging_steps=1, report_to="none", save_strategy="no",
        bf16=True, optim="sgd", learning_rate=0.5, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Rows(seq_len))
    trainer.remove_callback(watch.Watch)
    for one in watches:
        trainer.add_callback(one)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry], [p.detach() for p in model.parameters()]


def test_slow_copies_are_not_hidden_and_timing_them_changes_nothing(tmp_path, slow_copies):
    small = {"seq_len": 1024, "layers": 4, "hidden_size": 256, "kernel": "naive"}
    logs, weights = train(tmp_path, watches=[watch.Watch()], **small)
    assert watch.COPIES_HIDDEN not in logs[0], "the first step is no sample"
    hidden = [entry[watch.COPIES_HIDDEN] for entry in logs[1:]]
    print("hidden with slow copies:", hidden)
    assert max(hidden) < 0.25
    plain_logs, plain_weights = train(tmp_path, watches=[], **small)
    for name in ("loss", "grad_norm"):
        assert [entry[name] for entry in logs] == [entry[name] for entry in plain_logs]
    assert all(torch.equal(got, want) for got, want in zip(weights, plain_weights, strict=True))


def test_copies_under_much_compute_are_hidden_as_the_timeline_says(tmp_path):
    """Per layer of the forward some 15 ms of compute and 11 of copies; the third step is the traced one."""
    logs, _ = train(tmp_path, seq_len=32768, layers=4, hidden_size=2048, watches=[watch.Watch(trace=tmp_path / "trace.json")])
    hidden = [entry[watch.COPIES_HIDDEN] for entry in logs[1:]]
    traced = summary(read_lanes(read_trace(tmp_path / "trace.json")))["hidden"]["either"]
    print("hidden:", hidden, "by the timeline of the second of them:", traced)
    assert min(hidden) > 0.7
    assert hidden[1] == pytest.approx(traced, abs=0.15)


def test_the_timeline_of_a_step(tmp_path):
    """With its picture, and copies of what the layers keep in it."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=512, intermediate_size=1024, num_attention_heads=8, vocab_size=1000, num_hidden_layers=2)
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16)
    hf_fpdt.apply_fpdt(model, hf_fpdt.FPDTConfig(chunk_size=2048, offload="host", recompute=True))
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=1, max_steps=4, report_to="none", save_strategy="no", bf16=True, optim="sgd"
    )
    Trainer(model, arguments, train_dataset=Rows(), callbacks=[watch.Watch(trace=tmp_path / "trace.json")]).train()
    lanes = read_lanes(read_trace(tmp_path / "trace.json"))
    assert all(lanes[lane] for lane in LANES)
    assert 0 < summary(lanes)["hidden"]["either"] <= 1
    assert (tmp_path / "trace.png").stat().st_size > 10_000


def without_waiting(method):
    def call(*args, **kwargs):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return method(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return call


def test_an_evaluation_that_the_gpu_has_not_begun():
    """The host is far ahead: what it queued before the evaluation is training, what it queued in it is not."""
    product = torch.randn(4096, 4096, device="cuda")

    def work(times):
        for _ in range(times):
            product @ product

    def timed(times):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work(times)
        torch.cuda.synchronize()
        return time.perf_counter() - started

    timed(50)
    want = timed(100)
    torch.cuda.synchronize()
    interval = watch.Interval(torch.device("cuda", 0))
    work(100)
    interval.trained()
    work(400)
    interval.interrupted()
    torch.cuda.synchronize()
    assert interval.seconds() == pytest.approx(want, rel=0.25)
