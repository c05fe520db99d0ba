"""What a user does who has transformers but not fastalign: `test_transformers.py` runs it in a process of its own."""

import sys
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText

IMAGE_TOKEN = 31


def load(folder: str, **kwargs) -> torch.nn.Module:
    return AutoModel.from_pretrained(folder, trust_remote_code=True, **kwargs).eval()


def refusal(load, folder: str) -> str:
    try:
        load(folder)
    except Exception as error:
        return str(error)
    return "not refused"


@torch.no_grad()
def seen(vlm: torch.nn.Module, images: Tensor) -> Tensor:
    """What LLaVA's projector reads in a forward pass with an image in the prompt."""
    inputs, count = [], vlm.config.image_seq_length
    hook = vlm.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    prompt = torch.tensor([[1, *[IMAGE_TOKEN] * count, 2, 3]]).expand(len(images), -1)
    logits = vlm(input_ids=prompt, pixel_values=images).logits
    hook.remove()
    assert logits.shape == (len(images), count + 3, 32)
    return inputs[0]


def llava(tower: torch.nn.Module) -> torch.nn.Module:
    """A tiny LLaVA around a tower."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = transformers.LlamaConfig(vocab_size=32, **sizes)
    config = tower.config.llava_config(text, image_token_index=IMAGE_TOKEN)
    vlm = transformers.LlavaForConditionalGeneration(config).eval()
    vlm.model.vision_tower = tower
    return vlm


def gradient(tower: torch.nn.Module, images: Tensor, cotangent: Tensor) -> dict:
    """Of the patch embedding's weight; and the parameters that get none."""
    tower.train()(images).last_hidden_state.backward(cotangent)
    parameters = dict(tower.named_parameters())
    patch = next(value for value in parameters.values() if value.ndim == 4)
    return {"patch": patch.grad, "none": [name for name, value in parameters.items() if value.grad is None]}


@torch.no_grad()
def outputs(folder: str, images: Tensor) -> dict:
    tower = load(folder)
    out = tower(images, output_hidden_states=True, output_attentions=True)
    found = {
        "tokens": out.last_hidden_state,
        "tuple": tower(images, return_dict=False)[0],
        "hidden": out.hidden_states,
        "attentions": out.attentions,
    }
    tower.save_pretrained(f"{folder}-saved")
    found["files"] = sorted(path.name for path in Path(f"{folder}-saved").iterdir())
    found["saved"] = load(f"{folder}-saved")(images).last_hidden_state
    tower.set_attn_implementation("eager")
    found["eager"] = tower(images).last_hidden_state
    load(folder, dtype=torch.bfloat16).save_pretrained(f"{folder}-bf16")
    found["bf16"] = load(f"{folder}-bf16", dtype="auto")(images).last_hidden_state
    vlm = llava(load(folder))
    found["llava"] = seen(vlm, images)
    vlm.set_attn_implementation("eager")
    found["llava eager"] = seen(vlm, images)
    vlm.save_pretrained(f"{folder}-vlm")
    again = AutoModelForImageTextToText.from_pretrained(f"{folder}-vlm", trust_remote_code=True)
    found["llava saved"] = seen(again.eval(), images)
    return found


def main() -> None:
    sys.modules["fastalign"] = None  # importing it is an error
    cases = torch.load("cases.pt")
    capped = cases["refused"]
    loaders = (AutoModel.from_pretrained, transformers.CLIPVisionModel.from_pretrained)
    results = {"refusals": [refusal(load, capped) for load in loaders]}
    # First, while nothing else has made the tower's type known.
    vlm = AutoModelForImageTextToText.from_pretrained(
        "vlm", trust_remote_code=True, attn_implementation="sdpa"
    )
    results["vlm"] = seen(vlm.eval(), cases["towers"][capped]["images"])
    for folder, case in cases["towers"].items():
        tower = load(folder)
        results[folder] = outputs(folder, case["images"]) | {"gradient": gradient(tower, **case)}
        tower = load(folder)
        tower.gradient_checkpointing_enable()
        results[folder]["checkpointed"] = gradient(tower, **case)
    for folder, pictures in cases["pictures"].items():
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
        processor.save_pretrained(f"{folder}-processor")
        processor = AutoImageProcessor.from_pretrained(f"{folder}-processor", trust_remote_code=True)
        pixels = [processor(picture.numpy(), return_tensors="pt")["pixel_values"][0] for picture in pictures]
        results.setdefault(folder, {})["pixels"] = pixels
    torch.save(results, "results.pt")


if __name__ == "__main__":
    main()
