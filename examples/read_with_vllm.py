"""Answer from a memory with vLLM: the memory and the query go in as embeddings.

    pip install vllm
    python examples/read_with_vllm.py runs/qa1/checkpoint.safetensors --context story.txt --query 'Where is Mary?'

NOT RUN YET: written after vLLM's documentation of prompt embeddings. The server takes the same rows: start it with
--enable-prompt-embeds and send them to the Completions endpoint as base64 of torch.save. All rows go in as embeddings,
none as token ids, and prefix caching is off: mixed prompts have been reported to reuse the wrong cache entries.
Serve embeddings to users you trust alone.
"""

from __future__ import annotations

from common import arguments, query_ids, write


def main() -> None:
    args = arguments(__doc__)
    memory, tokenizer = write(args)
    rows = memory.prompt_embeds(query_ids(args, tokenizer))[0].cpu()  # [P + T, D]

    from vllm import LLM, SamplingParams

    server = LLM(model=str(args.served), dtype="float32", enable_prompt_embeds=True, enable_prefix_caching=False)
    sampling = SamplingParams(temperature=0.0, max_tokens=args.max_new_tokens, stop_token_ids=[tokenizer.end_id])
    (result,) = server.generate({"prompt_embeds": rows}, sampling)
    print(tokenizer.answer(list(result.outputs[0].token_ids)))


if __name__ == "__main__":
    main()
