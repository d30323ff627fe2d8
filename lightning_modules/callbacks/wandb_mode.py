"""Whether and how to mirror to Weights & Biases; imports neither Lightning nor W&B."""

import netrc
import os
import re
from typing import Literal
from urllib.parse import urlsplit

Mode = Literal["auto", "online", "offline", "off"]


def choose_mode(mode: Mode) -> str:
    """Turn auto into online (with a key), offline (without) or what `WANDB_MODE` says; other modes stay."""
    if mode != "auto":
        return mode
    wanted = os.environ.get("WANDB_MODE", "")
    if wanted in ("disabled", "dryrun", "offline", "online"):
        return {"disabled": "off", "dryrun": "offline"}.get(wanted, wanted)
    return "online" if has_key() else "offline"


def plain_name(name: str) -> str:
    """A name of the letters that W&B takes in ids and in names of artifacts; others become dashes."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", name)


def has_key() -> bool:
    """Whether a W&B key is configured in the environment or in .netrc, without asking the network."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        import wandb

        host = urlsplit(wandb.Settings().base_url).hostname
        return host is not None and netrc.netrc().authenticators(host) is not None
    except Exception:  # no .netrc, or one that cannot be read: then there is no key
        return False
