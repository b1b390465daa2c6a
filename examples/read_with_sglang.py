"""Answer from a memory with SGLang: the memory and the query go in as embeddings.

    pip install sglang
    python examples/read_with_sglang.py runs/qa1/checkpoint.safetensors --context story.txt --query 'Where is Mary?'

NOT RUN YET: written after SGLang's documentation of input embeddings. The server takes the same rows: start it with
--disable-radix-cache and POST {"input_embeds": rows, "sampling_params": ...} to /generate.
"""

from __future__ import annotations

from common import arguments, query_ids, write


def main() -> None:
    args = arguments(__doc__)
    memory, tokenizer = write(args)
    rows = memory.prompt_embeds(query_ids(args, tokenizer))[0].tolist()  # nested lists, [P + T][D]

    import sglang

    # cached prefixes are found by token ids, which embeddings do not have
    engine = sglang.Engine(model_path=str(args.served), dtype="float32", disable_radix_cache=True)
    try:
        result = engine.generate(input_embeds=rows, sampling_params={
            "temperature": 0.0, "max_new_tokens": args.max_new_tokens, "stop_token_ids": [tokenizer.end_id]})
    finally:
        engine.shutdown()
    print(result["text"])


if __name__ == "__main__":
    main()
