"""Independent forward passes of the original models, for tests only.

Each module writes one family in plain torch, from its config.json's keys and its paper: neither transformers nor
``helpers`` is used, so a mistake in a conversion cannot hide in its own reference. All of them offer

    shapes(original) -> {original tensor name: shape}
    logits(original, weights, input_ids, attention_mask, cache=None) -> [batch, tokens, vocabulary]

and ``checking.py`` holds them against what ``helpers.native.convert`` makes of the same weights.
"""
