"""Engines other than transformers and vLLM: llama.cpp, CTranslate2, MNN, and a comparison of all that run on a CPU.

Most of them live in an environment of their own, ``.venv-frameworks`` (``make frameworks``), so nothing is imported
here: a notebook takes what it needs from ``helpers.frameworks.llama_cpp``, ``.ctranslate2``, ``.mnn``
or ``.compare``.
"""
