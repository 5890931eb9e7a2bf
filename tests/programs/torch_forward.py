"""Training loops of a small Llama whose insides are recorded; every case runs without and with a recorder.

    torch_forward.py FOLDER

Writes FOLDER/<case>.h5 and prints per case what it ended with: both times it must be the same.
"""

import contextlib
import hashlib
import json
import sys
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import tracer

warnings.simplefilter("ignore")
torch.set_num_threads(1)
STEPS, BATCH, LENGTH, WORDS = 2, 2, 12, 61
CASES = {}
OPTIONS = {}


def case(**options):
    """Register a case; `options` are those of the recording."""

    def register(function):
        CASES[function.__name__] = function
        OPTIONS[function.__name__] = options
        return function

    return register


def build(dtype=torch.float32, dropout=0.1, lora=True):
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    if lora:
        adapters = LoraConfig(
            r=4,
            lora_alpha=8,
            lora_dropout=dropout,
            target_modules=["q_proj", "v_proj", "down_proj"],
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, adapters)
    return model.train()


def batches(count, length=LENGTH, *, unequal=False):
    data = torch.Generator().manual_seed(1)
    for i in range(count):
        ids = torch.randint(1, WORDS, (BATCH, length), generator=data)
        labels, mask = ids.clone(), torch.ones_like(ids)
        if unequal and i % 2:
            labels[:, -5:] = -100
            mask[:, -5:] = 0
        labels[0, :3] = -100
        yield {"input_ids": ids, "labels": labels, "attention_mask": mask}


def digest(model, optimizer):
    tensors = [*model.state_dict().values(), torch.get_rng_state()]
    tensors += [v for state in optimizer.state.values() for _, v in sorted(state.items()) if torch.is_tensor(v)]
    flat = b"".join(t.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes() for t in tensors)
    return hashlib.sha256(flat).hexdigest()


def train(model, *, micro=1, loss_of=None, between=None, data=None, scaler=None, average=False):
    """An AdamW loop; what it ended with."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    data = list(data or batches(STEPS * micro))
    for step in range(STEPS):
        for batch in data[step * micro : (step + 1) * micro]:
            loss = model(**batch).loss if loss_of is None else loss_of(model, batch)
            (loss if scaler is None else scaler.scale(loss)).backward()
            losses.append(float(loss))
        if average:
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.div_(micro)
        if scaler is not None:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad()
        if between is not None:
            between(model, batch, step)
    return digest(model, optimizer), losses


def module(model, ending):
    return next(m for name, m in model.named_modules() if name.endswith(ending))


EVERYTHING = {"micro_grads": True, "token_loss": True}


@case(**EVERYTHING)
def plain():
    return train(build())


@case()
def embedding_scaled():
    model = build()
    module(model, "embed_tokens").register_forward_hook(lambda m, args, output: output * 1.01)
    return train(model)


@case()
def output_shifted():
    model = build()
    module(model, "layers.1.mlp.up_proj").register_forward_hook(lambda m, args, output: output + 0.01)
    return train(model)


@case()
def positions_shifted_from_six_on():
    model = build()
    table = module(model, "rotary_emb")
    inner = table.forward
    table.forward = lambda x, position_ids: inner(x, position_ids=position_ids + (position_ids >= 6) * 3)
    return train(model)


@case()
def lora_scaled_after_the_first_step():
    def between(model, batch, step):
        if step == 0:
            module(model, "layers.1.self_attn.v_proj").scaling["default"] *= 1.5

    return train(build(), between=between)


@case(**EVERYTHING)
def checkpointing():
    model = build()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return train(model)


@case(**EVERYTHING)
def checkpointing_reentrant():
    model = build()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    return train(model)


@case()
def checkpointing_selective():
    """A checkpoint that keeps the outputs of some operations and counts all of them."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    model = build()
    inner = module(model, "layers.0.mlp")
    keep = {torch.ops.aten.index.Tensor, torch.ops.aten.mm.default}

    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op in keep else CheckpointPolicy.PREFER_RECOMPUTE

    forward = inner.forward
    inner.forward = lambda x: checkpoint(
        forward, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
    )
    return train(model)


@case(**EVERYTHING)
def autocast():
    def loss_of(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return model(**batch).loss

    return train(build(), loss_of=loss_of)


@case(**EVERYTHING)
def bfloat16():
    return train(build(torch.bfloat16), micro=3)


@case(**EVERYTHING)
def accumulated():
    return train(build(), micro=3, data=batches(STEPS * 3, unequal=True), average=True)


@case(**EVERYTHING)
def weighted_by_tokens():
    """As transformers' Trainer does it: each loss is a sum divided by the tokens of the step."""
    data = list(batches(STEPS * 3, unequal=True))
    tokens = iter(
        sum(int((b["labels"][:, 1:] != -100).sum()) for b in data[i // 3 * 3 :][:3]) for i in range(len(data))
    )

    def loss_of(model, batch):
        return model(**batch, num_items_in_batch=next(tokens)).loss

    return train(build(), micro=3, data=data, loss_of=loss_of)


@case(**EVERYTHING)
def scaled_loss():
    return train(build(), micro=2, scaler=torch.amp.GradScaler("cpu", init_scale=256.0))


@case(**EVERYTHING)
def compiled():
    return train(torch.compile(build(), backend="eager"))


@case()
def partly_compiled():
    model = build()
    module(model, "layers.0.mlp").compile(backend="eager")
    return train(model)


@case(**EVERYTHING, forward_rows=8)
def labels_kept_from_the_model():
    """The loop computes its loss itself; the labels are known only then."""

    def loss_of(model, batch):
        labels = batch["labels"].clone()
        logits = model(input_ids=batch["input_ids"]).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    return train(build(), loss_of=loss_of)


@case(**EVERYTHING)
def evaluated_between_steps():
    def between(model, batch, step):
        model.eval()
        with torch.no_grad():
            model(**batch)
        model(**batch)
        model.train()
        if step == STEPS - 1:
            with contextlib.suppress(IndexError):
                model(input_ids=batch["input_ids"] + WORDS)
        assert not any(m._forward_hooks for m in model.modules())

    return train(build(), between=between)


@case(modules=("*.mlp", "*.mlp.act_fn", "*.v_proj.lora_delta", "lm_head"), forward_rows=5)
def some_modules():
    return train(build())


@case(modules=("*rotary_emb",))
def rotary_table():
    """[1, L, head size]: the positions of all rows of the batch are the same."""
    return train(build())


@case(**EVERYTHING)
def all_parameters():
    return train(build(lora=False))


@case(**EVERYTHING)
def a_loss_of_its_own():
    """Not torch's cross-entropy: there are no losses of tokens to be seen."""

    def loss_of(model, batch):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        chosen = logits.log_softmax(-1)[:, :-1].gather(-1, batch["input_ids"][:, 1:, None])
        return -chosen.mean()

    return train(build(), loss_of=loss_of)


def main(folder):
    for name, run in CASES.items():
        plain_run = run()
        with tracer.record(folder / f"{name}.h5", what=frozenset(tracer_phases()), overwrite=True, **OPTIONS[name]):
            recorded = run()
        print(json.dumps({"case": name, "same": plain_run == recorded}), flush=True)


def tracer_phases():
    from tracer.schema import Phase

    return Phase


if __name__ == "__main__":
    main(Path(sys.argv[1]))
