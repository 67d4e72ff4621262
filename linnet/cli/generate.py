"""`linnet generate`: continue a text, streaming it to the terminal."""

import argparse
import sys


def add_parser(verbs) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "generate",
        help="continue a text",
        description="Continue a prompt with a model folder; the text streams to standard output.",
        epilog='Example: linnet generate runs/nano/model "def main(" --temperature 0.8 --seed 1',
    )
    parser.add_argument("model", help="model folder")
    parser.add_argument("prompt", help="text to continue, or - to read it from standard input")
    parser.add_argument("--max-tokens", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: 0.8)")
    parser.add_argument("--top-k", type=int, default=0, help="0 keeps all (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="default: %(default)s")
    parser.add_argument("--min-p", type=float, default=0.0, help="default: %(default)s")
    parser.add_argument("--seed", type=int, help="same seed, same text")
    parser.add_argument("--stop", action="append", default=[], help="text that ends it; repeatable")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "bfloat16", "float32"),
        help="to compute in; auto is bfloat16 where this CPU multiplies it in hardware",
    )
    parser.add_argument(
        "--quantization", choices=("int8",), help="round the weights, for speed and memory"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Generate."""
    from linnet.infer import SamplingParams, stream_text
    from linnet.model.weights import load_model
    from linnet.train.machine import compute_dtype

    params = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=args.seed,
        stop=tuple(args.stop),
    )
    model = load_model(args.model, dtype=compute_dtype(args.dtype), quantization=args.quantization)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    pieces = stream_text(model, prompt, params)
    sys.stdout.write(prompt)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0
