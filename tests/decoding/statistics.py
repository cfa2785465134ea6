"""A statistical test of counts against a distribution."""

import torch


def chi_square_p(counts: torch.Tensor, exact: torch.Tensor, fewest: float = 5.0) -> float:
    """Pearson's test: the probability of counts at least as far off, if ``exact`` were their distribution.

    Cells with fewer than ``fewest`` expected counts are merged; any count at probability 0 gives 0.
    """
    counts, exact = counts.double().flatten(), exact.double().flatten()
    if counts[exact == 0].sum() > 0:
        return 0.0
    expected = exact / exact.sum() * counts.sum()
    large = expected >= fewest
    cells = [(counts[large], expected[large])]
    if (~large).any() and expected[~large].sum() >= fewest:
        cells.append((counts[~large].sum()[None], expected[~large].sum()[None]))
    observed, expected = (torch.cat(x) for x in zip(*cells, strict=True))
    statistic = ((observed - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc((torch.tensor(len(observed)) - 1) / 2, (statistic / 2).float()))
