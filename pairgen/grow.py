"""Grow a pair store: add pairs, or append prompts to its list. Existing rows do not change.

Pair i depends on the seed, on i, and on its prompt alone, so a larger store begins with the smaller one.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

from d2g.core.claims import WorkClaims
from d2g.core.errors import UserError
from d2g.core.logs import logger
from pairgen.place import StorePlace
from pairgen.prompts import PromptList, prompt_list_sha256
from pairgen.store.spec import StoreSpec, differing_facts


def grow_store(place: StorePlace, spec: StoreSpec, prompts: PromptList, patience: float = 120.0) -> None:
    """Grow an existing store to the number of pairs and prompts of `spec`.

    It does nothing for a store of that size, and for one whose spec differs in more than its size:
    `create_store` reports that. patience: seconds without a sign of life after which a claim counts as dead.
    Raises UserError if rows of the store would get other prompts, and while another job makes its last shard.
    """
    # Return unless the store is smaller and its spec equal in everything else.
    old = place.read_spec()
    small = replace(
        spec, num_pairs=old.num_pairs, num_prompts=old.num_prompts, prompts_sha256=old.prompts_sha256
    )
    if differing_facts(small.as_json(), old.as_json()) or spec.num_pairs < old.num_pairs:
        return
    appended = spec.num_prompts > old.num_prompts
    changed = spec.prompts_sha256 != old.prompts_sha256
    if appended != changed or not (appended or spec.num_pairs > old.num_pairs):
        return
    if appended:
        _check_appended(place.name, old, prompts)

    # The new spec, which also records the earlier prompt lists.
    history = (*old.earlier_prompts, (old.num_prompts, old.prompts_sha256))
    new = replace(
        old,
        num_pairs=spec.num_pairs,
        num_prompts=spec.num_prompts,
        prompts_sha256=spec.prompts_sha256,
        earlier_prompts=history if appended else old.earlier_prompts,
    )

    # Reopen a last shard that gets more rows. The spec is written last, so that a kill leaves the old store.
    with place.claims(patience) as claims:
        if (incomplete := _last_shard_to_extend(old, new)) is not None:
            _claim(claims, incomplete, place.name)
        if unchanged := place.read_spec() == old:
            if incomplete is not None:
                place.reopen(incomplete, old)
            place.write_grown(new, prompts if appended else None)
    if not unchanged:
        return grow_store(place, spec, prompts, patience)  # another job has grown it meanwhile
    logger.info(
        "%s grows from %d to %d pairs and from %d to %d prompts",
        *(place.name, old.num_pairs, new.num_pairs, old.num_prompts, new.num_prompts),
    )


def _check_appended(folder: str, old: StoreSpec, prompts: Sequence[str]) -> None:
    """Raise UserError unless every pair of the store keeps its prompt."""
    if prompt_list_sha256(prompts[: old.num_prompts]) != old.prompts_sha256:
        raise UserError(
            f"{folder} holds pairs of another spec: its {old.num_prompts} prompts are not the first ones of "
            "--prompts; append new prompts at the end, or choose another folder"
        )
    if old.num_pairs > old.num_prompts * old.per_prompt:
        raise UserError(
            f"{folder} uses its {old.num_prompts} prompts several times over for {old.num_pairs} pairs, so "
            "appended prompts would change the prompts of its pairs; raise --num-pairs alone, or choose "
            "another folder"
        )


def _last_shard_to_extend(old: StoreSpec, new: StoreSpec) -> int | None:
    """The last shard of the old store if it has more rows in the new one, else None."""
    last = old.num_shards - 1
    return last if len(new.rows(last)) > len(old.rows(last)) else None


def _claim(claims: WorkClaims, shard: int, folder: str) -> None:
    while claims.take([shard]) is None:
        # The owner may be dead, which shows after `patience` seconds without an increase of its counter.
        if claims.is_alive_here(shard) or not claims.undecided([shard]):
            raise UserError(
                f"{folder} cannot grow now: {claims.owner(shard)} makes its last shard; wait for it or stop "
                "it, then run the same command again"
            )
        time.sleep(claims.poll_seconds)
