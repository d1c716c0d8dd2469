"""`anaphora serve`: run the server until it is told to stop."""

from __future__ import annotations

import argparse
import os
import sys

from anaphora.cli.parsing import Commands, add_command, add_config_flag
from anaphora.config import load

FLAGS = (
    ("server.host", "--host", "HOST", "address to listen on; not a loopback address only with API keys"),
    ("server.port", "--port", "PORT", "port to listen on"),
    ("server.workers", "--workers", "N", "gateway processes"),
    ("engine.model", "--model", "MODEL", "smollm2, a local folder, a GGUF file, or a Hugging Face id"),
    ("engine.kind", "--engine", "KIND", "transformers, echo (no model: emulates providers' prompt caching), or none"),
    ("engine.profile", "--profile", "NAME", "account for prompt caching like this model, such as claude-opus-5-5"),
    ("engine.kv_memory", "--kv-memory", "SIZE", "memory for reusable KV blocks, such as 2GiB"),
    ("engine.kv_disk", "--kv-disk", "SIZE", "disk space for KV blocks that outlive the process; 0: none"),
    ("engine.kv_codec", "--kv-codec", "NAME", "how KV is stored outside --kv-memory: raw, zstd, int8, int4"),
    ("gateway.upstreams", "--upstreams", "NAME=URL,...", "hosted APIs to stand in front of, instead of a model of one's own"),
    ("gateway.optimiser", "--optimiser", "MODE", "lay prompts out for the upstreams' own caches: off, advise or on"),
    ("embeddings.models", "--embeddings", "NAME,...", "encoders to serve: minilm, e5, static"),
    ("semantic.mode", "--semantic", "MODE", "answer questions asked before in other words: off, shadow or on"),
    ("cache.dir", "--cache-dir", "DIR", "where answers and converted models are kept"),
    ("cache.shared", "--shared", "URL", "Valkey or Redis server that shares answers, such as redis://host:6379/0"),
    ("engine.dtype", "--dtype", "TYPE", "auto, bfloat16 or float32"),
    ("engine.quantization", "--quantization", "KIND", "weights in 8 bits: none or int8"),
)
"""(setting, flag, placeholder, help)."""

EXAMPLES = """\
  anaphora serve                                   SmolLM2 on http://127.0.0.1:8080
  anaphora serve --model ./my-model --port 9000    a model folder of your own
  anaphora serve --upstreams anthropic=https://api.anthropic.com,openai=https://api.openai.com/v1
                                                   in front of hosted APIs, which clients ask with their own keys
  anaphora serve --engine echo --virtual-clock     no model: prompt caching of every provider's models, for tests
"""


def register(commands: Commands) -> None:
    parser = add_command(commands, "serve", run, summary="serve a model over HTTP", examples=EXAMPLES)
    add_config_flag(parser)
    for setting, flag, placeholder, text in FLAGS:
        parser.add_argument(flag, dest=setting, metavar=placeholder, help=text)
    parser.add_argument(
        "--virtual-clock",
        dest="server.virtual_clock",
        action="store_const",
        const="true",
        help="lifetimes follow a clock that POST /anaphora/clock moves; for tests",
    )


def run(args: argparse.Namespace) -> int:
    """Returns when the server was stopped. Raises ConfigError for settings it cannot start with."""
    given = vars(args)
    settings = [setting for setting, *_ in FLAGS] + ["server.virtual_clock"]
    flags = {setting: given[setting] for setting in settings if given[setting] is not None}
    loaded = load(args.config, flags)
    for warning in loaded.warnings:
        print(f"anaphora: warning: {warning}", file=sys.stderr)

    # NumPy's own threads: a question is compared with a few thousand vectors, which is done sooner than they have met.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from anaphora.server.run import serve

    if not sys.stderr.isatty():
        serve(loaded.config)
        return 0

    from anaphora.cli.terminal import Terminal

    with Terminal() as terminal:
        serve(loaded.config, terminal)
    return 0
