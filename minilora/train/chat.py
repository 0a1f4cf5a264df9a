"""`minilora chat`: talk with a model, and with what an adapter made of it.

Answers come token by token. Ctrl-C ends an answer, and between answers the conversation; so does the end of the input.
Where the input is no terminal, each of its lines is a question: `echo "Why?" | minilora chat`.

Read before: llm/generation, train/adapted.
"""

import argparse
import sys
from collections.abc import Iterator

import torch

from minilora.llm.generation import stream
from minilora.llm.tokenizer import Message, Tokenizer
from minilora.train.adapted import load_adapted
from minilora.train.templates import for_template


def run(args: argparse.Namespace) -> int:
    """Answer the question of the command line, or each that is asked.

    Raises:
        ValueError: if a model cannot be loaded, or a conversation is longer than the model was made for.
    """
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {args.max_new_tokens}: choose 1 or more")
    model, tokenizer = load_adapted(args.base, args.adapter, torch.bfloat16, args.method, args.template)
    messages: list[Message] = [{"role": "system", "content": args.system}] if args.system else []
    generator = None if args.seed is None else torch.Generator().manual_seed(args.seed)
    for question in [args.question] if args.question else questions():
        given = {"input": args.input} if args.input else {}
        messages += for_template([{"role": "user", "content": question} | given], tokenizer)
        most = model.config.max_seq_len - args.max_new_tokens
        messages, prompt = shortened(messages, tokenizer, most)
        tokens = stream(
            model,
            prompt,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            stop_tokens=tokenizer.stop_tokens,
            generator=generator,
        )
        messages.append({"role": "assistant", "content": say(tokenizer.decode_stream(tokens))})
    return 0


def shortened(messages: list[Message], tokenizer: Tokenizer, most: int) -> tuple[list[Message], list[int]]:
    """The newest part of a conversation that the template takes, and that has at most so many tokens; and these.

    What is forgotten goes question by question, from the oldest on, and is told of.

    Raises:
        ValueError: if not even the last question can be written down.
    """
    system = messages[:1] if messages[0]["role"] == "system" else []
    rest = messages[len(system) :]
    while True:
        try:
            prompt, problem = tokenizer.encode_chat([*system, *rest]), ""
        except ValueError as error:
            prompt, problem = [], str(error)
        if len(rest) == 1 or (not problem and len(prompt) <= most):
            if problem:
                raise ValueError(problem)
            return [*system, *rest], prompt
        print(f"(forgets the question before: {problem or 'the conversation is as long as the model can read'})")
        rest = rest[2:]


def questions() -> Iterator[str]:
    """What is typed, until the input ends or Ctrl-C is pressed."""
    if not sys.stdin.isatty():
        yield from filter(None, map(str.strip, sys.stdin))
        return
    print("Ctrl-C ends an answer; an empty line, or Ctrl-D, the conversation")
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not question:
            return
        yield question


def say(pieces: Iterator[str]) -> str:
    """Print an answer piece by piece, so far as Ctrl-C lets it, and give what was said."""
    said = ""
    try:
        for piece in pieces:
            print("".join(c if c.isprintable() or c in "\n\t" else "�" for c in piece), end="", flush=True)
            said += piece
    except KeyboardInterrupt:
        print(" …", end="")
    print()
    return said
