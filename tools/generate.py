"""Continue prompts with a trained model, slot by slot, showing how many additional steps each token got.

python tools/generate.py --checkpoint runs/quickstart --prompt "def main():" --max-new-tokens 60
python tools/generate.py --checkpoint runs/quickstart --prompt "import" "class " --temperature 0.8 --json
"""

import argparse
import json
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

from megatron_ponder.checkpoint.load import load_model
from megatron_ponder.data.tokenizer import Tokenizer
from megatron_ponder.errors import UserError, command
from megatron_ponder.inference.generate import Generation, generate
from megatron_ponder.inference.sampling import Sampling
from megatron_ponder.launch import prepare_cpu

# From none to many executed steps; background shades that stay readable on dark and light terminals.
SHADES = ("default", "on #e8eef9", "on #bcd0f5", "on #7fa6ee", "on #4a7fe0")


@command
def main() -> None:
    """Parse the command line, generate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="run folder or checkpoint folder")
    parser.add_argument("--prompt", nargs="+", required=True, help="one or several texts to continue")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    parser.add_argument("--top-k", type=int, default=0, help="choose among this many likeliest tokens; 0 for all")
    parser.add_argument("--top-p", type=float, default=1.0, help="choose among the likeliest with this probability")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threshold", type=float, help="τ; the trained model's unless given")
    parser.add_argument("--router-bias", type=float, help="α; positive buys more steps")
    parser.add_argument("--json", action="store_true", help="print one JSON object a prompt")
    arguments = parser.parse_args()

    prepare_cpu()
    loaded = load_model(arguments.checkpoint)
    if loaded.tokenizer is None:
        raise UserError(f"{loaded.folder} has no tokenizer; train with tokenizer.path set to generate text")
    prompts = [loaded.tokenizer.encode(text) or [loaded.tokenizer.eod_id] for text in arguments.prompt]
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
    pruning = loaded.model.pruning(True, arguments.threshold, arguments.router_bias)
    started = time.perf_counter()
    results = generate(
        loaded.model, prompts, arguments.max_new_tokens, pruning, sampling, stop_id=loaded.tokenizer.eod_id
    )
    seconds = time.perf_counter() - started
    console = Console(soft_wrap=True, highlight=False)
    for result in results:
        if arguments.json:
            print(json.dumps(_record(result, loaded.tokenizer), ensure_ascii=False))
        else:
            console.print(_shaded(result, loaded.tokenizer))
            console.print(Text(_steps_line(result, loaded.tokenizer), style="dim"), end="\n\n")
    if not arguments.json:
        console.print(_closing(results, seconds), style="bold")


def _record(result: Generation, tokenizer: Tokenizer) -> dict:
    return {
        "text": tokenizer.decode(result.tokens),
        "prompt_tokens": result.prompt,
        "tokens": result.tokens,
        "executed_steps": result.executed_steps,
        "cached_slots": result.cached_slots,
    }


def _shaded(result: Generation, tokenizer: Tokenizer) -> Text:
    """Prompt and continuation, each token on a shade of its executed steps; the last token was never run."""
    text = Text()
    ids = result.prompt + result.tokens
    shown = ""
    for position, steps in enumerate([*result.executed_steps, 0][: len(ids)]):
        whole = tokenizer.decode(ids[: position + 1])
        if whole.startswith(shown) and not whole.endswith("\ufffd"):  # a character may need several tokens
            style = SHADES[min(steps, len(SHADES) - 1)]
            text.append(whole[len(shown) :], style=style if style != "default" else "")
            shown = whole
    return text


def _steps_line(result: Generation, tokenizer: Tokenizer) -> str:
    ids = (result.prompt + result.tokens)[: len(result.executed_steps)]
    pairs = zip(ids, result.executed_steps, strict=True)
    return "additional steps: " + " ".join(f"{tokenizer.piece(token)!r}:{steps}" for token, steps in pairs)


def _closing(results: list[Generation], seconds: float) -> str:
    tokens = sum(len(result.tokens) for result in results)
    slots = sum(result.cached_slots for result in results)
    steps = [step for result in results for step in result.executed_steps]
    mean = sum(steps) / max(1, len(steps))
    return (
        f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s, {slots / seconds:.1f} slots/s, "
        f"{mean:.2f} additional steps per token"
    )


if __name__ == "__main__":
    main()
