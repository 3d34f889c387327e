"""A training loop of your own: any model of the table, any torch optimizer, gradients for one language's neurons only.

python examples/own_loop.py --model HuggingFaceTB/SmolLM2-135M --neurons out/neurons.safetensors --language mlt_Latn
"""

from __future__ import annotations

import argparse

import torch

import lape_fast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--neurons", required=True, help="neuron file of identify or select")
    parser.add_argument("--language", default="mlt_Latn")
    parser.add_argument("--corpus", default="cldr", help="folder of text, hub id, or cldr")
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()

    model, tokenizer = lape_fast.load_model(options.model)
    neurons = lape_fast.NeuronSet.load(options.neurons)
    corpus = lape_fast.open_corpus(options.corpus, languages=[options.language])
    documents = [text for _, text in zip(range(8 * options.steps), corpus.documents(options.language), strict=False)]

    # Everything else is frozen; the trained rows live in the model's own weights, with fp32 masters beside them.
    subnetwork = lape_fast.attach_subnetwork(model, neurons[options.language], policy="recompute")
    optimizer = torch.optim.AdamW(subnetwork.parameters(), lr=3e-4)
    model.train()
    for step in range(options.steps):
        texts = [documents[(8 * step + place) % len(documents)] for place in range(8)]
        batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=128).to(model.device)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == options.steps - 1:
            print(f"step {step}: loss {loss.item():.4f}")  # noqa: T201
    # The plain model with the tuned values in it.
    subnetwork.detach(keep=True)


if __name__ == "__main__":
    main()
