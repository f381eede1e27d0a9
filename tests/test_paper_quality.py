"""Quality at length: where keys stand, what is scored where, and the whole command on a CPU."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from reference import make_model, tiny_llama
from transformers import AutoModelForCausalLM

from benchmarks.paper import quality, quality_figure, quality_score
from benchmarks.paper.passkeys import KEY_LEN, Wording, document, keyed_row, repeated_row, text_of, wording
from benchmarks.result_files import read_calls

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from long_text import load_tokenizer

WORDS = Wording(torch.tensor([90, 91]), torch.arange(60, 80), torch.arange(80, 90), torch.tensor([92]))
TEXT = torch.arange(5000) % 50  # none of its tokens is in a line


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Documents with keys


@pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("length", [40, 257, 6000])
def test_a_key_stands_where_it_is_asked_to(length, depth):
    ids = document(TEXT, WORDS, length, depth, generator())
    assert len(ids) == length
    told, asked = (ids == 90).nonzero().flatten().tolist()
    filler = length - WORDS.length - (WORDS.length - 1)
    assert told == round(depth * filler)
    assert asked == length - (WORDS.length - 1)
    line = ids[told : told + WORDS.length]
    assert line[-1] == 92
    assert torch.equal(line[:-1], ids[asked:])
    assert ((ids[-KEY_LEN:] >= 80) & (ids[-KEY_LEN:] < 90)).all()
    rest = torch.cat([ids[:told], ids[told + WORDS.length : asked]])
    assert len(rest) == filler
    assert ((rest[1:] - rest[:-1]) % 50 == 1).all(), "the text goes on behind the key"


def test_every_key_of_a_row_is_told_before_it_is_asked_for():
    apart = []
    for seed in range(20):
        ids = keyed_row(TEXT, WORDS, 700, 15, generator(seed))
        assert len(ids) == 700
        starts = (ids == 90).nonzero().flatten().tolist()
        lines = [tuple(ids[start : start + WORDS.length].tolist()) for start in starts]
        assert len(lines) == 30
        for line in set(lines):
            first, second = (index for index, other in enumerate(lines) if other == line)
            apart.append(starts[second] - starts[first])
        assert len({line[2] for line in lines}) == 15, "names are different"
    assert min(apart) < 60
    assert max(apart) > 500


def test_spans_are_told_twice_at_no_fixed_distance():
    text, words = torch.arange(1000, 6000), Wording(WORDS.before, torch.arange(100, 400), torch.arange(400, 600), WORDS.after)
    ids = repeated_row(text, words, 1000, generator()).tolist()
    assert len(ids) == 1000
    apart = {second - first for first in range(1000) for second in range(first + 1, 1000) if ids[first] == ids[second]}
    assert len(apart) >= 5


def test_text_goes_on_at_its_start():
    found = text_of(TEXT[:7], 20, generator())
    assert ((found[1:] - found[:-1]) % 7 == 1).all()
    with pytest.raises(ValueError, match="3 tokens too many"):
        text_of(TEXT, -3, generator())


def test_the_words_of_a_tokenizer():
    """Digits are tokens of their own, and a line is what the tokenizer's text says."""
    texts = [{"text": "where the pass key of another thing is told, and other things of where another key is " * 20}]
    tokenizer = load_tokenizer(None, 320, texts)
    words = wording(tokenizer)
    told = tokenizer.decode(words.lines(1, generator())[0])
    assert told.startswith("\n# The pass key of ")
    assert told.endswith("\n")
    assert told.strip()[-KEY_LEN:].isdigit()
    assert told.strip()[:-KEY_LEN].split()[-1].isalpha()


# Scores


@pytest.fixture(scope="module")
def models():
    """The same weights, with transformers' eager attention and streamed in pieces."""
    from hf_fpdt import FPDTConfig, apply_fpdt

    config = tiny_llama(use_cache=False)
    return make_model(config, "eager").eval(), apply_fpdt(make_model(config, "eager").eval(), FPDTConfig(chunk_size=19))


def test_losses_of_tokens_are_those_of_a_plain_forward(models):
    plain, streamed = models
    ids = torch.randint(0, 97, (80,), generator=generator())
    with torch.no_grad():
        logits = plain(input_ids=ids[None]).logits[0].double()
    want = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
    got = quality_score.token_losses(streamed, ids, tile=16)
    assert got.shape == (79,)
    assert (got - want).abs().max() < 1e-4
    means = quality_score.bucket_means(got, 4)
    assert means.tolist() == pytest.approx(
        [want[a:b].mean().item() for a, b in [(0, 20), (20, 40), (40, 60), (60, 79)]], abs=1e-4
    )


def test_a_key_is_found_if_greedy_decoding_writes_it(models):
    plain, streamed = models
    ids = torch.randint(0, 97, (40,), generator=generator(3))
    written = plain.generate(ids[None, :-KEY_LEN], max_new_tokens=KEY_LEN, min_new_tokens=KEY_LEN, do_sample=False)[0]
    assert quality_score.finds_key(streamed, written)
    for place in range(1, KEY_LEN + 1):
        wrong = written.clone()
        wrong[-place] = (wrong[-place] + 1) % 97
        assert not quality_score.finds_key(streamed, wrong)


def test_every_block_of_text_stands_once_in_every_bucket(models, monkeypatch):
    """A model whose loss is the number of the block plus a hundred times that of the bucket."""
    windows = torch.arange(2 * 4 * 10).view(2, -1)

    def losses(model, ids):
        return ((ids % 40 // 10) + 10 * (ids // 40) + 100 * (torch.arange(40) // 10)).float()[:-1]

    monkeypatch.setattr(quality_score, "token_losses", losses)
    table = quality_score.position_losses(None, windows, 4, lambda: False)
    assert table == [[block % 4 + 10 * (block // 4) + 100 * bucket for bucket in range(4)] for block in range(8)]
    turns = iter([False, False, False, True])
    table = quality_score.position_losses(None, windows, 4, lambda: next(turns))
    assert sum(value is not None for row in table for value in row) == 3 * 4
    assert quality_figure.columns(table)[2] == pytest.approx((202 + 212 + 203) / 3)


def test_all_cells_have_a_sample_before_any_has_two(models, monkeypatch):
    monkeypatch.setattr(quality_score, "finds_key", lambda model, ids: len(ids) == 40)
    turns = iter([False] * 5 + [True] * 100)
    cells = quality_score.key_counts(models[0], TEXT, WORDS, [40, 60], [0.0, 1.0], 3, lambda: next(turns))
    assert [(cell["length"], cell["found"], cell["asked"]) for cell in cells] == [
        (40, 2, 2),
        (40, 1, 1),
        (60, 0, 1),
        (60, 0, 1),
    ]


def test_the_difference_of_two_buckets():
    mean, error = quality_figure.difference([[1.0, 1.5], [2.0, 2.3], [None, 9.0], [3.0, 3.4]], 0, 1)
    assert mean == pytest.approx(0.4)
    assert error == pytest.approx(0.1 / math.sqrt(3))
    assert all(map(math.isnan, quality_figure.difference([[1.0, 2.0], [None, 2.0]], 0, 1)))


# Stages


def test_a_longer_context_with_yarn(tmp_path):
    """As a configuration that is saved and read again says; the frequencies are no longer the same."""
    config = tiny_llama(max_position_embeddings=64, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    make_model(config).save_pretrained(tmp_path / "base")
    longer = quality.lengthened(config, 512, 64)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", config=longer)
    model.save_pretrained(tmp_path / "long")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "long")
    assert again.config.max_position_embeddings == 512
    rope = {key: again.config.rope_parameters[key] for key in ("rope_type", "factor", "rope_theta")}
    assert rope == {"rope_type": "yarn", "factor": 8.0, "rope_theta": 500000.0}
    assert again.config.rope_parameters["original_max_position_embeddings"] == 64
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert not torch.equal(again.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)


def test_the_whole_command(tmp_path, monkeypatch, capsys):
    out = tmp_path / "found"
    monkeypatch.setattr("sys.argv", ["quality", "all", "--tiny", "--folder", str(tmp_path / "run"), "--out", str(out)])
    quality.main()
    (call,) = read_calls(f"{out}.json")
    assert [row["model"] for row in call["rows"]] == ["base", "128", "256"]
    assert call["runs"]["256"]["from"] == "128"
    assert len(call["runs"]["base"]["losses"]) == quality.SMALL.steps[0]
    for row in call["rows"]:
        assert all(value == pytest.approx(math.log(640), abs=1) for line in row["losses"] for value in line)
        assert {cell["length"] for cell in row["keys"]} == {32, 64, 128, 256}
        assert all(cell["asked"] == 1 for cell in row["keys"])
    assert len(call["said"]) == 3
    assert call["said"][0] in capsys.readouterr().out
    assert (tmp_path / "found.png").stat().st_size > 20_000


def test_stages_end_in_time_with_what_they_have(tmp_path, monkeypatch):
    """No step and no measurement where there is no time; all the same there is a checkpoint and a picture."""
    words = ["quality", "all", "--tiny", "--folder", str(tmp_path), "--out", str(tmp_path / "found"), "--time-limit", "0"]
    monkeypatch.setattr("sys.argv", words)
    quality.main()
    content = json.loads((tmp_path / "found.json").read_text())
    assert all(run["losses"] == [] for run in content["runs"].values())
    assert all(cell["asked"] == 0 for row in content["rows"] for cell in row["keys"])


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["extend"], "extend --tokens None: extend takes one of 65536, 131072"),
        (["extend", "--tokens", "4096"], "extend --tokens 4096"),
        (["pretrain", "--tokens", "65536"], "pretrain --tokens 65536"),
        (["evaluate", "--model", "4096"], "evaluate --model 4096: evaluate takes one of base, 65536, 131072"),
        (["all", "--steps", "3"], "all --steps 3"),
    ],
)
def test_bad_options(words, text):
    with pytest.raises(ValueError, match=text):
        quality._arguments(words)
