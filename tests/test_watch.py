"""
What `Watch` adds to Trainer's logs, against tokens counted by hand, operations written out term by term, and a clock that only
moves in training, evaluation and saving. A failure means that a run reports a speed that it does not have.
"""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers.trainer
from ranks import run_ranks
from reference import VOCAB, make_batch, make_model, make_streamed, tiny_gemma2, tiny_llama, tiny_mistral
from test_sequence_parallel import batch_of, shard_of
from torch.utils.data import SequentialSampler
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from benchmarks import point
from benchmarks.shapes import llama_config, step_flops
from hf_fpdt import FPDTConfig, apply_fpdt, restore, watch
from hf_fpdt.flops import PEAK_BF16, matrix_flops, training_flops
from hf_fpdt.plugin import resolve_settings
from hf_fpdt.transfers import transfers_for
from hf_fpdt.watch import TOKENS_PER_S, Watch
from hf_fpdt.work import works_in

STEP_S, EVALUATION_S, SAVE_S = 1.0, 100.0, 1000.0
LENGTHS = [9, 30, 17, 22, 5, 41, 33, 12, 8, 26, 19, 40]  # rows of 3 and then 2 in a batch, so the last one is shorter
FIELDS = {"fpdt/causal_mfu", "fpdt/gpu_peak_gib", "fpdt/host_gib", "fpdt/transfer_gib_per_s", "fpdt/copies_hidden"}


class Clock:
    """Seconds that pass only where a test says so."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class TimedTrainer(Trainer):
    clock: Clock

    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)

    def training_step(self, *args, **kwargs):
        self.clock.now += STEP_S
        return super().training_step(*args, **kwargs)

    def evaluation_loop(self, *args, **kwargs):
        self.clock.now += EVALUATION_S
        return super().evaluation_loop(*args, **kwargs)

    def _save_checkpoint(self, *args, **kwargs):
        self.clock.now += SAVE_S
        return super()._save_checkpoint(*args, **kwargs)


class Reporter(TrainerCallback):
    """What TensorBoard or W&B would be given."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(watch, "time", clock)
    monkeypatch.setattr(TimedTrainer, "clock", clock, raising=False)
    return clock


def rows(lengths=LENGTHS):
    return [{"input_ids": torch.arange(3, 3 + n) % VOCAB, "labels": torch.arange(3, 3 + n) % VOCAB} for n in lengths]


def padded(samples):
    """On the right, with a mask."""
    longest = max(len(sample["input_ids"]) for sample in samples)
    batch = {"input_ids": [], "labels": [], "attention_mask": []}
    for sample in samples:
        ids = sample["input_ids"]
        fill = longest - len(ids)
        batch["input_ids"].append(torch.cat([ids, torch.zeros(fill, dtype=torch.int64)]))
        batch["labels"].append(torch.cat([ids, torch.full((fill,), -100)]))
        batch["attention_mask"].append(torch.cat([torch.ones_like(ids), torch.zeros(fill, dtype=torch.int64)]))
    return {name: torch.stack(values) for name, values in batch.items()}


def make_trainer(model, tmp_path, lengths=LENGTHS, callbacks=None, **arguments) -> TimedTrainer:
    settings = {
        "output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "save_strategy": "no", "num_train_epochs": 1,
        "per_device_train_batch_size": 2, "per_device_eval_batch_size": 4, "logging_steps": 1, "disable_tqdm": True, "seed": 0,
        "optim": "sgd",
    }  # fmt: skip
    return TimedTrainer(
        model, TrainingArguments(**{**settings, **arguments}), data_collator=padded, train_dataset=rows(lengths),
        eval_dataset=rows(LENGTHS[:4]), callbacks=callbacks,
    )  # fmt: skip


def rates(log) -> list[float]:
    return [entry[TOKENS_PER_S] for entry in log if "loss" in entry]


def training_logs(log):
    return [entry for entry in log if "loss" in entry]


@pytest.mark.parametrize(("accumulation", "logging"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_tokens_of_ragged_and_accumulated_batches(tmp_path, clock, accumulation, logging):
    lengths, reporter = [*LENGTHS, 13], Reporter()  # 7 batches, the last with one row
    model = make_streamed(tiny_llama(), 16)
    settings = {"gradient_accumulation_steps": accumulation, "logging_steps": logging}
    trainer = make_trainer(model, tmp_path, lengths, [reporter], **settings)
    trainer.train()
    batches = [sum(lengths[at : at + 2]) for at in range(0, len(lengths), 2)]
    steps = [batches[at : at + accumulation] for at in range(0, len(batches), accumulation)]
    windows = [steps[at : at + logging] for at in range(0, len(steps), logging)]
    windows = [[n for step in window for n in step] for window in windows if len(window) == logging]
    want = [sum(window) / (len(window) * STEP_S) for window in windows]
    assert rates(trainer.state.log_history) == pytest.approx(want)
    assert rates(reporter.seen) == pytest.approx(want)
    assert not any(FIELDS & set(entry) for entry in reporter.seen), "a CPU has no such thing"
    assert sum(work.tokens for _, work in works_in(model)) == sum(lengths)


class Metered:
    """Which batches, counted from 0, went through the model while a meter was set, by the meter."""

    def __init__(self, monkeypatch):
        self.batches, self._transfers = {}, transfers_for(torch.device("cpu"))
        seen, step = iter(range(1000)), TimedTrainer.training_step

        def counted(trainer, *args, **kwargs):
            loss, batch = step(trainer, *args, **kwargs), next(seen)
            if self._transfers.meter is not None:
                self.batches.setdefault(self._transfers.meter, []).append(batch)
            return loss

        monkeypatch.setattr(TimedTrainer, "training_step", counted)

    def samples(self) -> list[list[int]]:
        assert self._transfers.meter is None
        return list(self.batches.values())


@pytest.mark.parametrize(
    ("logging", "accumulation", "want"),
    [
        (1, 1, [[1], [2], [3], [4], [5]]),  # the first interval is the first step, which is no sample
        (3, 1, [[1], [3]]),
        (2, 1, [[1], [2], [4]]),
        (4, 1, [[1], [4]]),  # nobody logs the second
        (1, 2, [[2, 3], [4, 5]]),
        (2, 2, [[2, 3], [4, 5]]),
        (100, 1, [[1]]),
    ],
)
def test_the_copies_of_one_step_between_two_logs_are_timed(tmp_path, clock, monkeypatch, logging, accumulation, want):
    metered = Metered(monkeypatch)
    settings = {"logging_steps": logging, "gradient_accumulation_steps": accumulation}
    often = {"eval_strategy": "steps", "eval_steps": 1}  # evaluations are not
    make_trainer(make_streamed(tiny_llama(), 16), tmp_path, **settings, **often).train()
    assert metered.samples() == want


def test_a_training_that_broke_off_in_a_timed_step(tmp_path, clock, monkeypatch):
    """Leaves no meter behind once another begins, and the other has one of its own."""

    class Break(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 1 and not broken:
                broken.append(True)
                raise RuntimeError("out of memory")

    broken, metered = [], Metered(monkeypatch)
    trainer = make_trainer(make_streamed(tiny_llama(), 16), tmp_path, callbacks=[Break()], max_steps=3, logging_steps=3)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    trainer.train()
    assert metered.samples() == [[1], [3]]


def test_two_watches_time_different_steps(tmp_path, clock, monkeypatch):
    """So that the one that logs, the first, always has its own."""
    metered = Metered(monkeypatch)
    trainer = make_trainer(make_streamed(tiny_llama(), 16), tmp_path, callbacks=[Watch()], logging_steps=2)
    trainer.train()
    assert metered.samples() == [[1], [2], [3], [4]]


def test_models_that_do_not_stream_are_not_timed(tmp_path, clock, monkeypatch):
    metered = Metered(monkeypatch)
    make_trainer(restore(make_streamed(tiny_llama(), 16)), tmp_path).train()
    trainer = make_trainer(make_streamed(tiny_llama(), 16), tmp_path)
    trainer.remove_callback(Watch)
    trainer.train()
    assert metered.samples() == []


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_the_line_above_the_progress_bar(tmp_path, clock, capsys, disable_tqdm):
    """Trainer's own callbacks print the entry behind ours; one that is added to a finished Trainer is too late for that."""
    trainer = make_trainer(make_streamed(tiny_llama(), 16), tmp_path, max_steps=1, disable_tqdm=disable_tqdm)
    trainer.train()
    assert f"'{TOKENS_PER_S}': '39'" in capsys.readouterr().out
    trainer.remove_callback(Watch)
    trainer.add_callback(Watch())
    trainer.train()
    assert TOKENS_PER_S not in capsys.readouterr().out
    assert rates(trainer.state.log_history) == [39.0]


def test_evaluations_and_checkpoints_take_no_training_time(tmp_path, clock):
    """Every two steps, between two logs, at the end of epochs, and before the first step."""
    often = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 2, "logging_steps": 3}
    trainer = make_trainer(make_streamed(tiny_llama(), 16), tmp_path, eval_on_start=True, **often)
    trainer.train()
    assert clock.now == 6 * STEP_S + 7 * EVALUATION_S + 3 * SAVE_S
    want = [sum(LENGTHS[:6]) / 3, sum(LENGTHS[6:]) / 3]
    assert rates(trainer.state.log_history) == pytest.approx(want)
    assert not [entry for entry in trainer.state.log_history if "eval_loss" in entry and TOKENS_PER_S in entry]

    epochs = {"eval_strategy": "epoch", "save_strategy": "epoch", "logging_steps": 4, "num_train_epochs": 2}
    trainer = make_trainer(make_streamed(tiny_llama(), 16), tmp_path / "epochs", **epochs)
    trainer.train()
    twice = LENGTHS * 2
    assert rates(trainer.state.log_history) == pytest.approx([sum(twice[at : at + 8]) / 4 for at in (0, 8, 16)])


def test_a_resumed_run_counts_what_it_does(tmp_path, clock):
    settings = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 2}
    make_trainer(make_streamed(tiny_llama(), 16), tmp_path, max_steps=2, **settings).train()
    trainer = make_trainer(make_streamed(tiny_llama(), 16), tmp_path, max_steps=6, **settings)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(tmp_path))
    want = [sum(LENGTHS[at : at + 4]) / 2 for at in (0, 4, 8)]
    assert rates(trainer.state.log_history) == pytest.approx(want)


def test_a_model_that_does_not_stream_is_left_alone(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(watch, "Interval", None)  # nothing is measured
    make_streamed(tiny_llama(), 16)  # another one does
    for model in (make_model(tiny_llama(), "sdpa"), restore(make_streamed(tiny_llama(), 16))):
        trainer = make_trainer(model, tmp_path)
        trainer.train()
        assert len(training_logs(trainer.state.log_history)) == 6
        assert not [name for entry in trainer.state.log_history for name in entry if name.startswith("fpdt/")]


def test_a_model_that_was_switched_over_has_no_fields(tmp_path, clock):
    model = make_streamed(tiny_llama(), 16)
    model.set_attn_implementation("sdpa")
    trainer = make_trainer(model, tmp_path)
    trainer.train()
    assert not [name for entry in trainer.state.log_history for name in entry if name.startswith("fpdt/")]


def test_once_in_every_trainer(tmp_path, clock):
    for _ in range(2):
        model = apply_fpdt(make_streamed(tiny_llama(), 16))
    assert transformers.trainer.DEFAULT_CALLBACKS.count(Watch) == 1
    reporter = Reporter()
    trainer = make_trainer(model, tmp_path, callbacks=[Watch(), reporter])  # a second one, added by hand
    trainer.train()
    want = [sum(LENGTHS[at : at + 2]) for at in range(0, len(LENGTHS), 2)]
    assert rates(reporter.seen) == pytest.approx(want)


def test_removed(tmp_path, clock):
    trainer = make_trainer(make_streamed(tiny_llama(), 16), tmp_path)
    trainer.remove_callback(Watch)
    trainer.train()
    assert not [name for entry in trainer.state.log_history for name in entry if name.startswith("fpdt/")]


def test_logs_of_others_are_left_alone(tmp_path, clock):
    """Only Trainer's own entry comes behind a wait for the GPU."""

    class Chatty(TimedTrainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            self.log({"loss": 1.0})
            return loss

    model = make_streamed(tiny_llama(), 16)
    trainer = make_trainer(model, tmp_path)
    trainer.__class__ = Chatty
    trainer.train()
    with_rate = [entry for entry in trainer.state.log_history if TOKENS_PER_S in entry]
    assert len(with_rate) == 6
    assert all("learning_rate" in entry for entry in with_rate)


def test_kernel_is_named_once(tmp_path, clock, caplog):
    with caplog.at_level("INFO", logger="hf_fpdt.watch"):
        make_trainer(make_streamed(tiny_llama(), 16, kernel="naive"), tmp_path).train()
    assert [record.getMessage() for record in caplog.records if record.name == "hf_fpdt.watch"] == [
        "hf_fpdt: attention runs in naive"
    ]


START = "import json, sys\nimport hf_fpdt\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
START += "config = LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)\n"
MODEL = "model = LlamaForCausalLM._from_config(config, attn_implementation='fpdt')\n"
SAY = """
import transformers.trainer
found = [c.__name__ for c in transformers.trainer.DEFAULT_CALLBACKS]
print(json.dumps([found, [type(f).__name__ for f in sys.meta_path if "fpdt" in type(f).__module__]]))
"""


@pytest.mark.parametrize(
    ("code", "watched"),
    [
        (START + "assert 'transformers.trainer' not in sys.modules\n" + MODEL * 2 + "from transformers import Trainer", True),
        (START + "from transformers import Trainer\n" + MODEL * 2, True),
        (START + "model = LlamaForCausalLM(config)\n", False),
        (START + MODEL + "assert 'transformers.trainer' not in sys.modules", True),
    ],
)
def test_whichever_is_imported_first(code, watched):
    result = subprocess.run([sys.executable, "-c", code + SAY], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    callbacks, finders = json.loads(result.stdout.strip().splitlines()[-1])
    assert callbacks.count("Watch") == watched
    assert finders == []


def attention_of(model, batch, **kwargs) -> int:
    """Operations that were counted for the attention of one step."""
    before = sum(work.attention_flops for _, work in works_in(model))
    model(**batch, **kwargs).loss.backward()
    return sum(work.attention_flops for _, work in works_in(model)) - before


SETTINGS = [{}, {"recompute": False}, {"save_attention": False}, {"offload": "host", "kv": "streamed"}]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("chunk_size", [7, 48])
def test_attention_counts_once_what_is_seen(settings, chunk_size):
    """2 layers, 4 heads of 8: two products in the forward and four in the backward of 2 operations a pair and dimension."""
    a_pair = 2 * 4 * (2 + 4) * 2 * 8
    dense = make_streamed(tiny_llama(), chunk_size, **settings)
    assert attention_of(dense, make_batch(2, 48)) == a_pair * 2 * sum(range(1, 49))
    window = make_streamed(tiny_mistral(), chunk_size, **settings)
    assert attention_of(window, make_batch(2, 48)) == a_pair * 2 * sum(min(n, 11) for n in range(1, 49))
    mixed = make_streamed(tiny_gemma2(), chunk_size, **settings)
    assert attention_of(mixed, make_batch(1, 48)) == a_pair // 2 * sum(n + min(n, 11) for n in range(1, 49))
    packed = batch_of(46, "packed")
    assert attention_of(dense, packed) == a_pair * sum(n * (n + 1) // 2 for n in (11, 1, 20, 2, 12))
    assert attention_of(window, packed) == a_pair * sum(min(i, 11) for n in (11, 1, 20, 2, 12) for i in range(1, n + 1))
    assert [work.tokens for _, work in works_in(dense)] == [0, 2 * 48 + 46]  # the layers belong to the inner model


def test_only_training_counts():
    model = make_streamed(tiny_llama(), 16)
    batch = make_batch()
    model.eval()(**batch)
    with torch.no_grad():
        model.train()(**batch)
    assert not any(work.tokens or work.attention_flops for _, work in works_in(model))
    model(**batch).loss.backward()
    assert works_in(model)[1][1].tokens == 2 * 48
    assert works_in(restore(model)) == []


def _shared(rank: int, kind: str) -> tuple[int, int]:
    config = FPDTConfig(chunk_size=14)
    model = apply_fpdt(make_model(tiny_llama(), "eager"), config, sp_group=torch.distributed.group.WORLD)
    model(**shard_of(batch_of(46, kind), config, rank, 2)).loss.backward()
    work = works_in(model)[1][1]
    return work.tokens, work.attention_flops


def test_shared_sequences_count_the_shard():
    a_pair = 2 * 4 * 6 * 2 * 8
    assert run_ranks(_shared, 2, "all") == [(46, a_pair * 2 * sum(range(1, 47)) // 2)] * 2  # two rows of 23
    pairs = sum(n * (n + 1) // 2 for n in (11, 1, 20, 2, 12))
    assert run_ranks(_shared, 2, "packed") == [(23, a_pair * pairs // 2)] * 2


def layer_flops() -> int:
    """Weights of the layers of `tiny_llama`: q and o, k and v, and three of the MLP."""
    return 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 56)


def test_matrix_products_of_a_llama():
    head = 32 * VOCAB
    for tied in (False, True):
        model = make_model(tiny_llama(tie_word_embeddings=tied))
        assert training_flops([(model, 0, 0), (model.model, 10, 123)]) == 6 * 10 * (layer_flops() + head) + 123
    model.requires_grad_(False)
    assert training_flops([(model, 0, 0), (model.model, 10, 0)]) == 4 * 10 * (layer_flops() + head)
    assert training_flops([(model.model, 10, 0)]) == 4 * 10 * layer_flops(), "no output layer, no product"


def test_matrix_products_of_adapters():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(make_model(tiny_llama()), config).get_base_model()
    adapters = 2 * 4 * (32 + 32)
    want = 4 * layer_flops() + 6 * (adapters + 32 * VOCAB)  # the copy of the head that is trained, and not the original
    assert training_flops([(model, 0, 0), (model.model, 1, 0)]) == want


def test_matrix_products_of_experts():
    shape = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = MixtralConfig(**shape, num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    model = MixtralForCausalLM(config)
    weights = 4 * 16 * 16 + 4 * 16 + 2 * 3 * 16 * 24 + 16 * VOCAB  # attention, router, two experts, head
    assert training_flops([(model, 0, 0), (model.model, 5, 0)]) == 6 * 5 * weights
    assert matrix_flops(model) != matrix_flops(model), "not known without the number of experts"


@pytest.mark.parametrize(("documents", "window", "lora"), [(1, 0, False), (4, 0, False), (1, 24, False), (1, 0, True)])
def test_the_benchmarks_count_alike(documents, window, lora):
    """`benchmarks/shapes.py` counts from the configuration, half a query less a document, and no adapters."""
    config, seq_len = llama_config("tiny", 2, window), 512
    model = make_streamed(config, 128).requires_grad_(not lora)
    batch = make_batch(1, seq_len)
    batch["position_ids"] = torch.arange(seq_len // documents).repeat(documents)[None]
    counted = attention_of(model, batch) if not lora else 2 * 6 * seq_len * (seq_len + 1) // 2 * 4 * 2 * 16
    want = step_flops(config, seq_len, frozen=lora, documents=documents, window=window)
    half_a_query = 2 * 3 * 4 * seq_len * 4 * 16 / 2
    less = half_a_query if not window else 2 * 3 * 4 * window / 2 * 4 * 16
    assert training_flops([(model, 0, 0), (model.model, seq_len, counted)]) == pytest.approx(want + less, rel=1e-12)
    assert point.PEAK_BF16.items() <= PEAK_BF16.items()


def test_a_training_that_broke_off_in_the_traced_step(tmp_path, clock):
    class Break(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 2 and not broken:
                broken.append(True)
                raise RuntimeError("out of memory")

    broken = []
    trainer = make_trainer(make_streamed(tiny_llama(), 16), tmp_path, callbacks=[Watch(trace=tmp_path / "trace.json"), Break()])
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    trainer.train()
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_packed_weights_count_as_what_they_are():
    quantized = torch.nn.Linear(32, 48)
    quantized.weight = torch.nn.Parameter(torch.zeros(32 * 48 // 2, 1, dtype=torch.uint8), requires_grad=False)
    assert matrix_flops(quantized) == 4 * 32 * 48


def test_moved_bytes():
    """What a layer keeps on the host goes there and comes back once: x, K, V, out (fp32) and lse; so does the last output."""
    model = make_streamed(tiny_llama(), 16, offload="host")
    transfers, tokens = transfers_for(torch.device("cpu")), 2 * 48
    before = transfers.moved_bytes
    model(**make_batch(2, 48)).loss.backward()
    kept = 2 * (4 * (32 + 2 * 16 + 32) + 4 * 4) + 4 * 32
    assert transfers.moved_bytes - before == 2 * tokens * kept
    resident = make_streamed(tiny_llama(), 16)
    before = transfers.moved_bytes
    resident(**make_batch(2, 48)).loss.backward()
    assert transfers.moved_bytes == before


@pytest.mark.parametrize("by_variable", [True, False])
def test_timeline_of_the_third_step(tmp_path, clock, monkeypatch, by_variable):
    path = tmp_path / "trace.json"
    if by_variable:
        monkeypatch.setenv("FPDT_TRACE", str(path))
    trainer = make_trainer(
        make_streamed(tiny_llama(), 16), tmp_path, callbacks=None if by_variable else [Watch(trace=path)], max_steps=5
    )
    names = []

    class Mark(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            with torch.profiler.record_function(f"optimizer step {state.global_step + 1}"):
                names.append(path.exists())

    trainer.add_callback(Mark)
    trainer.train()
    assert names == [False, False, False, True, True]
    events = {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}
    assert {name for name in events if name.startswith("optimizer step")} == {"optimizer step 3"}
    assert "_StreamedLayerBackward" in events
    want = [sum(LENGTHS[at : at + 2]) for at in range(0, 10, 2)]
    assert rates(trainer.state.log_history) == pytest.approx(want), "writing is no training"


def test_timelines_that_cannot_be(tmp_path, clock, monkeypatch):
    with pytest.raises(ValueError, match=r"Watch\(trace=...\)='.*/no/such.json': the path of a file in an existing folder"):
        Watch(trace=tmp_path / "no" / "such.json")
    with pytest.raises(ValueError, match=r"trace\.png': the path of a file in an existing folder is needed"):
        Watch(trace=tmp_path / "trace.png")
    monkeypatch.setenv("FPDT_TRACE", "")
    with pytest.raises(ValueError, match="FPDT_TRACE='': the path of a file in an existing folder is needed"):
        make_trainer(make_streamed(tiny_llama(), 16), tmp_path)
    monkeypatch.setenv("FPDT_TRACE", str(tmp_path / "trace.json"))
    with pytest.raises(ValueError, match="is the timeline of optimizer step 3, and this training has 2"):
        make_trainer(make_streamed(tiny_llama(), 16), tmp_path, max_steps=2).train()
    with pytest.raises(ValueError, match="the model that is trained does not stream"):
        make_trainer(make_model(tiny_llama()), tmp_path).train()
    with torch.profiler.profile(), pytest.raises(ValueError, match="another torch profiler is running"):
        make_trainer(make_streamed(tiny_llama(), 16), tmp_path).train()


def test_a_timeline_that_nobody_writes(tmp_path):
    environment = os.environ | {"FPDT_TRACE": str(tmp_path / "trace.json")}
    command = [sys.executable, "-c", START + MODEL]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=environment)
    assert "FPDT_TRACE is set and nothing was written: no Trainer was made" in result.stderr


def test_the_variable_is_no_setting():
    assert resolve_settings(FPDTConfig(), None, None, {"FPDT_TRACE": "x", "FPDT_KERNEL": "naive"}).kernel == "naive"
    with pytest.raises(ValueError, match=r"The environment sets FPDT_TRACES, which is no setting; .*, FPDT_TRACE\."):
        resolve_settings(FPDTConfig(), None, None, {"FPDT_TRACES": "x"})
    with pytest.raises(ValueError, match="block of the DeepSpeed configuration sets trace, which is no setting"):
        resolve_settings(FPDTConfig(), None, {"trace": "x"}, {})


def test_fields_of_a_gpu(monkeypatch):
    """The arithmetic alone; what the numbers really are is tests/gpu/test_watch_gpu.py."""
    model, device = make_model(tiny_llama()), SimpleNamespace(type="cuda")
    monkeypatch.setattr(watch, "peak_flops", lambda device: 1e9)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 << 30)
    resets = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    locked = SimpleNamespace(arena=SimpleNamespace(locked_bytes=5 << 29))
    monkeypatch.setattr(watch, "transfers_for", lambda device: locked)
    one = Watch()
    one._works = [(model, watch.Work()), (model.model, watch.Work(tokens=100, attention_flops=7000))]
    one._before = [watch.Work(), watch.Work(tokens=60, attention_flops=1000)]
    one._interval = SimpleNamespace(device=device, seconds=lambda: 4.0, moved_bytes=lambda: 1 << 30, copies_hidden=lambda: 0.0)
    want = {
        "fpdt/tokens_per_s_per_gpu": 10.0, "fpdt/causal_mfu": (6 * 40 * (layer_flops() + 32 * VOCAB) + 6000) / 4 / 1e9,
        "fpdt/gpu_peak_gib": 3.0, "fpdt/host_gib": 2.5, "fpdt/transfer_gib_per_s": 0.25, "fpdt/copies_hidden": 0.0,
    }  # fmt: skip
    assert one._fields(reset_peak=True) == pytest.approx(want)
    assert resets == [device]
    monkeypatch.setattr(watch, "peak_flops", lambda device: None)
    one._interval.copies_hidden = lambda: None  # nothing was copied
    fields = one._fields(reset_peak=False)
    assert set(fields) == set(want) - {"fpdt/causal_mfu", "fpdt/copies_hidden"}
    assert len(resets) == 1
