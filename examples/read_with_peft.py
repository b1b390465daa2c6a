"""Answer from a memory with peft: the memory becomes a prompt-tuning adapter of the backbone.

    pip install 'gradmem-kernels[peft]'
    python examples/read_with_peft.py runs/qa1/checkpoint.safetensors --context story.txt --query 'Where is Mary?'

Run on a CPU with a tiny model of random weights (peft 0.21.2, transformers 5.23.0).
"""

from __future__ import annotations

from common import arguments, query_ids, write


def main() -> None:
    args = arguments(__doc__)
    memory, tokenizer = write(args)
    memory.export_peft(args.served / "memory", base_model=str(args.served))

    # from here on nothing of gradmem takes part but the tokenizer
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    reader = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(args.served), args.served / "memory")
    ids = query_ids(args, tokenizer)
    out = reader.generate(input_ids=ids, max_new_tokens=args.max_new_tokens, do_sample=False,
                          eos_token_id=tokenizer.end_id, pad_token_id=tokenizer.pad_id)
    print(tokenizer.answer(out[0, ids.shape[1] :].tolist()))


if __name__ == "__main__":
    main()
