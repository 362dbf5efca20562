"""The command line, as a person types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import autotp
from autotp.cli import commands, main

ROOT = Path(__file__).parents[2]
FIELDS = ("hidden_size=64", "num_hidden_layers=2", "num_attention_heads=4", "num_key_value_heads=2", "head_dim=16",
          "intermediate_size=97", "vocab_size=1001")  # fmt: skip
SMALL = [word for field in FIELDS for word in ("--set", field)]


def test_inspect_folds_repeated_blocks_and_gives_totals(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "llama", "--tp", "2", *SMALL]) == 0
    out = capsys.readouterr().out
    line = next(x for x in out.splitlines() if "model.layers.*.self_attn.q_proj.weight" in x)
    assert line.split()[1:5] == ["2", "64x64", "32x64", "column"]
    assert "row" in next(x for x in out.splitlines() if "o_proj" in x)
    assert "collectives: 6 in a forward" in out
    assert "5 in a backward" in out


def test_inspect_json_graph_and_dot(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "llama", "--tp", "2", "--json", *SMALL]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (
        plan["totals"]["parameters_per_rank"][0] * 2 - plan["totals"]["parameters"]
        == 5 * 64 + (2 * 501 - 1001) * 64 + (2 * 49 - 97) * 64 * 6 + (2 * 501 - 1001) * 64
    )
    assert main(["inspect", "llama", "--tp", "2", "--graph", "--rank", "1", *SMALL]) == 0
    text = capsys.readouterr().out
    assert "# rank 1 of 2" in text
    assert "column_parallel_linear(" in text
    assert "row_parallel_linear(" in text
    assert main(["inspect", "llama", "--tp", "2", "--dot", *SMALL]) == 0
    dot = capsys.readouterr().out
    assert dot.startswith('digraph "LlamaForCausalLM" {')
    assert dot.rstrip().endswith("}")


def test_verify_gives_a_verdict_and_an_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "tests.models:SmallGPT", "--tp", "3"]) == 0
    out = capsys.readouterr().out
    assert "verdict: the parallel model equals the dense one" in out
    assert "gradients" in out


def test_verify_says_when_models_differ(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from passes.ops import collectives

    monkeypatch.setattr(collectives._Enter, "backward", staticmethod(lambda ctx, *grads: (None, *grads)))
    assert main(["verify", "tests.models:SmallGPT", "--tp", "2"]) == 1
    assert "NOT EQUAL" in capsys.readouterr().out


def test_verify_compares_the_loss_of_a_language_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "llama", "--tp", "2", *SMALL, "--dtype", "bfloat16", "--sequence", "6"]) == 0
    out = capsys.readouterr().out
    assert "  loss       " in out
    assert "bfloat16, relative errors must stay under 0." in out
    norms = next(line for line in out.splitlines() if line.startswith("  norm")).split()
    assert float(norms[1]) == pytest.approx(float(norms[3]), rel=0.01)


def test_verify_reduces_what_is_too_large(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Few layers first, then widths; the heads stay, and the report says what was compared."""
    monkeypatch.setattr(commands, "_memory", lambda: 60_000_000)
    large = ["--set", "num_attention_heads=6", "--set", "num_key_value_heads=3", "--set", "hidden_size=384"]
    assert main(["verify", "llama", "--tp", "2", *large, "--set", "vocab_size=1003", "--sequence", "4"]) == 0
    first, *_ = out = capsys.readouterr().out.splitlines()
    assert first.startswith("verified at a reduced size: with num_hidden_layers=2 ")
    assert "hidden_size=" in first
    assert "heads" not in first
    assert "parameters) does not fit here" in first
    assert out[-1] == "verdict: the parallel model equals the dense one"


def test_verify_of_what_is_too_large_and_has_no_config(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "_memory", lambda: 1000)
    assert main(["verify", "tests.models:SmallGPT", "--tp", "2"]) == 2
    assert "this machine has" in capsys.readouterr().err


def test_a_directory_with_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import BertConfig

    BertConfig(hidden_size=48, num_hidden_layers=1, num_attention_heads=6, intermediate_size=101).save_pretrained(
        tmp_path
    )
    assert main(["inspect", str(tmp_path), "--tp", "3"]) == 0
    assert "on 3 ranks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["inspect", "lama", "--tp", "2"], "did you mean llama"),
        (["inspect", "llama", "--tp", "0"], "1 or more"),
        (["inspect", "llama", "--tp", "2", "--set", "num_layers=2"], "did you mean num_hidden_layers"),
        (["inspect", "llama", "--tp", "2", "--set", "num_hidden_layers"], "field=value"),
        (["inspect", "llama", "--tp", "2", "--rank", "2"], "ranks 0 to 1"),
        (["verify", "no_such_module:thing", "--tp", "2"], "cannot import no_such_module"),
        (["verify", "tests.models:SmalGPT", "--tp", "2"], "did you mean SmallGPT"),
        (["verify", "tests.models:free", "--tp", "2"], "has no free"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert "Traceback" not in error


def test_a_directory_without_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path), "--tp", "2"]) == 2
    assert "config.json" in capsys.readouterr().err


def test_nothing_but_the_result_goes_into_a_pipe() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "autotp", "inspect", "tests.models:SmallGPT", "--tp", "2", "--json"],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    assert json.loads(done.stdout)["tp"] == 2
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--help"], 0, "usage: autotp"),
        (["verify", "--help"], 0, "usage: autotp verify"),
        (["--version"], 0, f"autotp {autotp.__version__}"),
        ([], 2, "required: COMMAND"),
        (["inspct"], 2, "invalid choice: 'inspct'"),
        (["inspect", "--tp", "2"], 2, "required: MODEL"),
        (["inspect", "llama", "--tp", "2", "--ranks", "0"], 2, "unrecognized arguments: --ranks"),
        (["inspect", "llama", "--tp", "0"], 2, "1 or more"),
        (["inspect", "llama", "--tp", "2", "--rank", "2"], 2, "ranks 0 to 1"),
    ],
)
def test_help_the_version_and_usage_errors_do_not_import_torch(arguments: list[str], code: int, says: str) -> None:
    """Importing torch and rich takes seconds."""
    script = f"""
import sys
from autotp.cli import main
try:
    code = main({arguments!r})
except SystemExit as exit:
    code = exit.code
slow = {{"torch", "rich", "passes", "networkx", "transformers"}} & set(sys.modules)
sys.exit(f"imports {{slow}}" if slow else code)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == code, done.stderr
    assert says in done.stdout + done.stderr


def broken() -> torch.nn.Module:
    raise RuntimeError("no weights here")


def test_a_factory_that_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "tests.cli.test_main:broken", "--tp", "2"]) == 2
    assert "no weights here" in capsys.readouterr().err


def test_inspect_of_a_model_that_must_run_once_to_be_captured_in_parts(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("d_model=64", "encoder_layers=1", "decoder_layers=1", "encoder_attention_heads=4",
             "decoder_attention_heads=4", "encoder_ffn_dim=64", "decoder_ffn_dim=64", "src_vocab_size=101",
             "tgt_vocab_size=101")  # fmt: skip
    settings = [word for field in sizes for word in ("--set", field)]
    assert main(["inspect", "fsmt", "--tp", "2", "--sequence", "16", "--graph", *settings]) == 0
    out, err = capsys.readouterr()
    assert "depends on the values in a tensor: running it once, with weights, to find its parts" in err
    assert out.startswith("# part model.encoder\n# rank 0 of 2\n")
    assert "\n# part model.decoder\n# rank 0 of 2\n" in out
