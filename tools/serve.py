"""Serve a trained model over HTTP, with OpenAI's completions endpoint.

python tools/serve.py --checkpoint runs/quickstart
python tools/serve.py --checkpoint runs/quickstart --port 8080 --threshold 0.3 --api-key-file key.txt

The key may stand in the environment variable PONDER_API_KEY instead.
"""

import argparse
import os
import time
from pathlib import Path

from megatron_ponder.checkpoint.load import load_model
from megatron_ponder.errors import UserError, command
from megatron_ponder.inference.engine import Engine
from megatron_ponder.inference.scheduler import Batching
from megatron_ponder.launch import prepare_cpu


@command
def main() -> None:
    """Parse the command line and serve until a signal."""
    try:
        from megatron_ponder.inference.server.application import Limits
        from megatron_ponder.inference.server.protocol import ServedModel
        from megatron_ponder.inference.server.serving import Address, serve
    except ModuleNotFoundError as error:
        raise UserError(f"the server needs {error.name}: pip install 'megatron_ponder[serve]'") from None

    address, limits, batching = Address(), Limits(), Batching()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="run folder or checkpoint folder")
    parser.add_argument("--model-name", help="under which clients know the model; the folder's unless given")
    parser.add_argument("--host", default=address.host, help="0.0.0.0 to be reached from other machines")
    parser.add_argument("--port", type=int, default=address.port, help="0 for any that is free")
    parser.add_argument("--api-key-file", type=Path, help="a file with the key that clients must send")
    parser.add_argument("--threshold", type=float, help="τ; the trained model's unless given")
    parser.add_argument("--router-bias", type=float, help="α; positive buys more steps")
    parser.add_argument("--max-sequences", type=int, default=batching.max_sequences, help="that run at a time")
    parser.add_argument("--max-slots", type=int, default=batching.max_slots, help="in the cache at a time")
    parser.add_argument("--queue-limit", type=int, default=64, help="sequences that may wait; then clients get 429")
    parser.add_argument("--timeout", type=float, default=limits.seconds, help="seconds for a request")
    parser.add_argument("--max-body-bytes", type=int, default=limits.body_bytes, help="of a request")
    parser.add_argument("--grace", type=float, default=30.0, help="seconds for requests to finish after SIGTERM")
    arguments = parser.parse_args()

    if arguments.queue_limit < 0 or arguments.grace < 0:
        raise UserError("--queue-limit and --grace must not be negative; use 0 for none")
    batching = Batching(arguments.max_sequences, arguments.max_slots)
    limits = Limits(arguments.timeout, arguments.max_body_bytes, _api_key(arguments.api_key_file))
    prepare_cpu()

    def load() -> tuple[Engine, ServedModel]:
        loaded = load_model(arguments.checkpoint)
        if loaded.tokenizer is None:
            raise UserError(f"{loaded.folder} has no tokenizer; train with tokenizer.path set to serve text")
        pruning = loaded.model.pruning(True, arguments.threshold, arguments.router_bias)
        engine = Engine(loaded.model, pruning=pruning, batching=batching, tokenizer=loaded.tokenizer)
        name = arguments.model_name or arguments.checkpoint.resolve().name
        longest = loaded.config.model.max_position_embeddings
        return engine, ServedModel(name, loaded.tokenizer, longest, int(time.time()))

    most_sequences = batching.max_sequences + arguments.queue_limit
    serve(load, Address(arguments.host, arguments.port), limits, most_sequences, arguments.grace)


def _api_key(file: Path | None) -> str | None:
    """From the file, or the environment; None if there is neither."""
    return os.environ.get("PONDER_API_KEY") if file is None else file.read_text(encoding="utf-8").strip()


if __name__ == "__main__":
    main()
