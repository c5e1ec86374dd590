"""The options of forms that have a name."""

from __future__ import annotations

from typing import Any

_NO_BASIS = {"sides": "none", "skinny_rank": 0}
_BOTH_SIDES = {
    "betas": (0.95, 0.95),
    "factor_beta": None,
    "precondition_frequency": 10,
    "sides": "both",
    "skinny_rank": 0,
    "nesterov": False,
    "orthogonalize": 0,
    "refresh_schedule": "fixed",
    "rescale_exp_avg_sq": False,
}

PRESETS: dict[str, dict[str, Any]] = {
    "adamuon": {**_NO_BASIS, "orthogonalize": 5},
    "adamw": {"max_precond_dim": 0, "betas": (0.9, 0.999)},
    "dykaf": {},
    "muon": {**_NO_BASIS, "betas": (0.95, 0.95), "second_moment": "none", "orthogonalize": 5},
    "paper": {**_BOTH_SIDES, "integrator": "bug", "init": "rank_one"},
    "soap": _BOTH_SIDES,
}


def preset(name: str) -> dict[str, Any]:
    """The options of :class:`dykaf.DyKAF` that make it the optimizer of this name.

    - "dykaf": the defaults.
    - "paper": the paper's own form (Yudin et al., arXiv 2511.06477).
    - "soap": SOAP (Vyas et al., arXiv 2409.11321).
    - "muon": Muon with Nesterov's momentum, its updates of AdamW's size (Jordan et al. 2024; Liu et
      al., arXiv 2502.16982), so that rates are AdamW's.
    - "adamuon": Adam's direction, orthogonalised, without a basis (AdaMuon's kind: Si et al., arXiv
      2507.11005).
    - "adamw": AdamW (Loshchilov & Hutter, arXiv 1711.05101) for everything.

    Args:
        name: of the form.

    Returns:
        a new dictionary, to be changed and given on: ``DyKAF(params, lr=1e-3, **preset("soap"))``.

    Raises:
        ValueError: for a name that is not known.

    docs/algorithm.md tells in what the forms differ from their papers.
    """
    if name not in PRESETS:
        raise ValueError(f"name: expected one of {', '.join(sorted(PRESETS))}, got {name!r}")
    return dict(PRESETS[name])
