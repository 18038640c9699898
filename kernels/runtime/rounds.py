"""How the tiles of a product go over the programs of a GPU, the last round cut along K where most would have none."""

from dataclasses import dataclass
from functools import cache

MIN_STEPS = 4  # of a part along K: fewer would not repay the exchange of its sums


@dataclass(frozen=True)
class Rounds:
    """`whole` tiles at once each, the others in `parts` of `part_steps` each, by `programs` programs."""

    programs: int
    whole: int
    parts: int
    part_steps: int

    def items(self, tiles: int) -> int:
        """Whole tiles and parts of tiles together."""
        return self.whole + (tiles - self.whole) * self.parts


@cache
def share(tiles: int, k_steps: int, programs: int, max_parts: int) -> Rounds:
    """Cut the tiles of the last round where that fills programs that would have none."""
    left = tiles % programs
    parts = min(programs // left, max_parts, k_steps // MIN_STEPS) if left else 1
    if parts < 2:
        return Rounds(min(tiles, programs), tiles, 1, k_steps)
    part_steps = -(-k_steps // parts)
    parts = -(-k_steps // part_steps)
    return Rounds(min(tiles - left + left * parts, programs), tiles - left, parts, part_steps)
