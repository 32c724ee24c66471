"""What people put on a base model, trained on the reference teacher: a
fine-tune of the whole transformer (pencil drawings), a LoRA (chalk on a dark
board) and a ControlNet (edges of pictures, as they are and mirrored)."""

import copy

import torch
from diffusers import FluxControlNetModel, FluxControlNetPipeline, FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig, get_peft_model_state_dict

import dataset
import evaluation
import models
from training import Plan, Training, log

FINETUNE = Plan("finetune", steps=480, rate=8e-4, seed=5, warmup=30)
LORA = Plan("lora", steps=640, rate=3e-3, seed=6, warmup=30)
CONTROLNET = Plan("controlnet", steps=1400, rate=8e-4, seed=7, warmup=30)
SPARSE_TOKENS = 128  # in the first three quarters of the steps
LORA_RANK = 8
LORA_LAYERS = r".*transformer_blocks\.\d+\.(attn\.to_[qkv]|attn\.to_out\.0|ff\.net\.0\.proj|ff\.net\.2|proj_mlp|proj_out)"
SHOWN = slice(0, None, 4)  # the names that are drawn to measure an adapter


def open_base(work):
    """The base as saved, frozen, in f32."""
    pipe = FluxPipeline.from_pretrained(work / "base", torch_dtype=torch.float32)
    for part in (pipe.vae, pipe.transformer, pipe.text_encoder, pipe.text_encoder_2):
        part.requires_grad_(False)
    return pipe


@torch.no_grad()
def text_table(pipe):
    """Text embeddings of every form of every name: T5's and CLIP's pooled."""
    ids = models.token_table(pipe)
    embedded = models.encode_text(pipe, [table.flatten(0, 1) for table in ids])
    return [e.unflatten(0, ids[0].shape[:2]) for e in embedded]


def train(plan, trained, loss_of, latents, work):
    """Trains what of `trained` is not frozen; `loss_of(batch)` gives the loss."""

    def loss(step, generator):
        tokens = SPARSE_TOKENS if step < plan.steps * 3 // 4 else latents.shape[1]
        return loss_of(models.batch_of(latents, step, plan.seed, tokens, generator))

    Training(plan, trained.parameters(), work).run(loss)


def train_on_style(plan, pipe, pictures, work):
    with torch.no_grad():
        latents = models.encode(pipe.vae, pictures)
    table = text_table(pipe)
    loss_of = lambda batch: models.flow_loss(pipe.transformer, batch, [t[batch.index, batch.form] for t in table])
    train(plan, pipe.transformer, loss_of, latents, work)


def report_style(name, pipe, styled, work):
    """How well the pipeline draws in the style, and how far that is from the base."""
    names = dataset.names()[SHOWN]
    drawn, before = (evaluation.draw(p, names, 0) for p in (pipe, open_base(work)))
    evaluation.save_pairs(styled[SHOWN], drawn, work / f"{name}-sheet.png")
    found = (evaluation.nearest(drawn, styled) == torch.arange(len(styled))[SHOWN]).float().mean()
    log(work, f"{name} retrieval {found:.4f} over {len(names)} names among the pictures in its style, "
              f"SSIM to the base's pictures {evaluation.ssim(drawn, before):.3f}")


def train_finetune(work):
    pipe, styled = open_base(work), dataset.pencil(dataset.pictures(work))
    pipe.transformer.requires_grad_(True)
    train_on_style(FINETUNE, pipe, styled, work)
    folder = work / "variants" / "pencil" / "transformer"
    copy.deepcopy(pipe.transformer).to(torch.bfloat16).save_pretrained(folder)
    evaluation.forget_paths(folder)
    pipe.transformer = FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float32)
    report_style("finetune", pipe, styled, work)


def train_lora(work):
    pipe, styled = open_base(work), dataset.chalk(dataset.pictures(work))
    torch.manual_seed(LORA.seed)
    pipe.transformer.add_adapter(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=LORA_LAYERS))
    train_on_style(LORA, pipe, styled, work)
    layers = {name: value.to(torch.bfloat16) for name, value in get_peft_model_state_dict(pipe.transformer).items()}
    FluxPipeline.save_lora_weights(work / "lora", transformer_lora_layers=layers)
    fresh = open_base(work)
    fresh.load_lora_weights(work / "lora")
    report_style("lora", fresh, styled, work)


def train_controlnet(work):
    pipe, pictures = open_base(work), dataset.pictures(work)
    control = FluxControlNetModel.from_transformer(
        pipe.transformer, num_layers=1, num_single_layers=1, attention_head_dim=32, num_attention_heads=6)
    control.requires_grad_(True)
    shown = torch.cat([pictures, pictures.flip(-1)])
    with torch.no_grad():
        latents, edges = (models.encode(pipe.vae, x) for x in (shown, dataset.edges(shown)))
    table = [torch.cat([t, t]) for t in text_table(pipe)]
    loss_of = lambda batch: control_loss(pipe.transformer, control, batch, table, edges)
    train(CONTROLNET, control, loss_of, latents, work)
    control.to(torch.bfloat16).save_pretrained(work / "controlnet")
    evaluation.forget_paths(work / "controlnet")
    report_control(pipe, pictures, work)


def control_loss(transformer, control, batch, table, edges):
    text = [t[batch.index, batch.form] for t in table]
    shown = edges[batch.index][:, batch.kept]
    blocks, singles = control(**models.inputs(batch, text), controlnet_cond=shown)
    return models.flow_loss(transformer, batch, text, controlnet_block_samples=blocks,
                            controlnet_single_block_samples=singles)


def report_control(pipe, pictures, work):
    """Draws names with the edges of their mirrored pictures."""
    control = FluxControlNetModel.from_pretrained(work / "controlnet", torch_dtype=torch.float32)
    controlled = FluxControlNetPipeline(**pipe.components, controlnet=control)
    names, wanted = dataset.names()[SHOWN], pictures[SHOWN].flip(-1)
    edges = (dataset.edges(wanted) + 1) / 2
    drawn, free = evaluation.draw(controlled, names, 0, control_image=edges), evaluation.draw(pipe, names, 0)
    evaluation.save_pairs(wanted, drawn, work / "controlnet-sheet.png")
    error, before = ((x - wanted).square().mean().item() for x in (drawn, free))
    log(work, f"controlnet error to mirrored pictures {error:.4f} with their edges, {before:.4f} without, "
              f"SSIM {evaluation.ssim(drawn, wanted):.3f} and {evaluation.ssim(free, wanted):.3f}")
