"""Keeps tokens of the Hub out of messages."""

from __future__ import annotations

import re

from huggingface_hub import get_token


def hide_tokens(text: str) -> str:
    """The text without tokens of the Hub: that of this machine, and whatever looks like one."""
    token = get_token()
    if token and len(token) >= 8:
        text = text.replace(token, "hf_***")
    text = re.sub(r"\bhf_[A-Za-z0-9]{16,}", "hf_***", text)
    return re.sub(r"\bBearer [^\s'\"]+", "Bearer ***", text)
