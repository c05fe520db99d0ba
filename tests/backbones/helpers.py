"""The small ViT of the tests, as arguments of timm and of transformers."""

SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32}
HF = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 192,
    "image_size": 32,
    "patch_size": 16,
}
