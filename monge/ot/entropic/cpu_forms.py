"""The compiled form of a problem on the CPU, in two variants.

Kernel form exponentiates the scores once, so that a sweep is two multiplications a score and runs at the
speed of reading them. It needs ``exp(-spread / epsilon)`` to be far from underflow. Log form exponentiates in
every sweep and is right at any spread.

Shapes: B problems, T rows, E columns, N tiles of L rows.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from monge.ot.entropic import cpu_kernels as kernels
from monge.ot.entropic import iteration
from monge.ot.entropic.iteration import Potentials, Stopping
from monge.ot.threads import run_all, split

# Scores for which a sweep is long enough to share it among threads, which costs some 50 microseconds.
_SHARE_KERNEL = 1 << 22
_SHARE_LOG = 1 << 19
_MOMENT_TILES = 8  # tiles (512 rows) whose plan one thread holds at a time for the second moments


class CompiledForm:
    """Scores laid out for the compiled kernels.

    Args:
        scores_BTE: float32 or float64 on the CPU; scores of rows without mass are not looked at.
        row_mass_BT: float64.
        epsilon: the regularisation.
        top_BE: the largest score of each column asks for kernel form, None for log form.
    """

    def __init__(
        self, scores_BTE: Tensor, row_mass_BT: Tensor, epsilon: float, top_BE: Tensor | None = None
    ) -> None:
        self.shape = B, T, E = tuple(scores_BTE.shape)
        self.as_kernel = top_BE is not None
        self.inverse_epsilon = 1.0 / epsilon
        # What the tiles have taken in of each column, and the potentials therefore must not.
        self.offset_BE = torch.zeros(B, E, dtype=torch.float64) if top_BE is None else -top_BE / epsilon
        self.row_mass_BT = row_mass_BT.detach()
        scores, offset = scores_BTE.detach().contiguous().numpy(), self.offset_BE.numpy()
        count = -(-T // kernels.TILE)
        self.tiles_BNEL = np.empty((B, count, E, kernels.TILE), dtype=scores.dtype)
        self.mass_BT = np.zeros((B, count * kernels.TILE))
        self.mass_BT[:, :T] = row_mass_BT.detach().numpy()

        work = B * T * E
        threads = torch.get_num_threads()
        self.pieces = self._cut(threads if work >= _SHARE_LOG else 1)
        self.sweep_pieces = self._cut(
            threads if work >= (_SHARE_KERNEL if self.as_kernel else _SHARE_LOG) else 1
        )

        def fill(piece: tuple[int, int, int]) -> None:
            b, first, last = piece
            kernels.fill_tiles(
                scores[b],
                self.mass_BT[b],
                offset[b],
                self.inverse_epsilon,
                self.as_kernel,
                first,
                last,
                self.tiles_BNEL[b],
            )

        run_all(fill, self.pieces)

    def iterate(
        self, log_v_BE: Tensor, col_mass_BE: Tensor, stopping: Stopping, *, give_up_until: int
    ) -> Potentials:
        """:func:`monge.ot.entropic.iteration.iterate`, compiled where a problem fits one thread."""
        B = self.shape[0]
        if len(self.sweep_pieces) > B:
            return iteration.iterate(
                self.column_sums, log_v_BE, col_mass_BE, stopping, give_up_until=give_up_until
            )
        relative_BE = (log_v_BE - self.offset_BE).contiguous()
        relative, target = relative_BE.numpy(), col_mass_BE.contiguous().numpy()
        units = stopping.unit_B.tolist()
        sweeps_B = torch.empty(B, dtype=torch.int64)
        errors_B = torch.empty(B, dtype=torch.float64)

        def run(b: int) -> None:
            sweeps_B[b], errors_B[b] = kernels.iterate(
                self.tiles_BNEL[b],
                self.mass_BT[b],
                self.inverse_epsilon,
                self.as_kernel,
                relative[b],
                target[b],
                units[b],
                stopping.tol,
                stopping.max_iters,
                give_up_until,
            )

        run_all(run, range(B), alone=B * self.shape[1] * self.shape[2] < _SHARE_LOG)
        return Potentials(relative_BE + self.offset_BE, sweeps_B, errors_B, int(sweeps_B.max()) if B else 0)

    def column_sums(self, log_v_BE: Tensor) -> Tensor:
        """(B, E): the column sums of the row-scaled plan, the pieces' sums added in order."""
        B, _, E = self.shape
        relative = (log_v_BE - self.offset_BE).contiguous().numpy()
        parts = np.zeros((len(self.sweep_pieces), E))

        def sweep(index: int) -> None:
            b, first, last = self.sweep_pieces[index]
            kernels.column_sums(
                self.tiles_BNEL[b],
                self.mass_BT[b],
                relative[b],
                self.inverse_epsilon,
                self.as_kernel,
                first,
                last,
                parts[index],
            )

        run_all(sweep, range(len(self.sweep_pieces)))
        sums = np.zeros((B, E))
        for (b, _, _), part in zip(self.sweep_pieces, parts):
            sums[b] += part
        return torch.from_numpy(sums)

    def into_plan(self, log_v_BE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The row-scaled plan (B, T, E), the rows' log potentials (B, T) and the plan's row sums (B, T).

        The plan takes over the memory of the tiles, each tile that of its own rows, so nothing can follow.
        """
        B, T, E = self.shape
        relative = (log_v_BE - self.offset_BE).contiguous().numpy()
        plan = self.tiles_BNEL.reshape(B, self.mass_BT.shape[1], E)
        log_sum, total = np.empty((B, T)), np.empty((B, T))

        def write(piece: tuple[int, int, int]) -> None:
            b, first, last = piece
            rows = slice(first * kernels.TILE, min(last * kernels.TILE, T))
            kernels.write_plan(
                self.tiles_BNEL[b],
                self.mass_BT[b],
                relative[b],
                self.inverse_epsilon,
                self.as_kernel,
                first,
                last,
                plan[b, rows],
                log_sum[b, rows],
                total[b, rows],
            )

        run_all(write, self.pieces)
        log_u_BT = self.row_mass_BT.log() - torch.from_numpy(log_sum)
        return torch.from_numpy(plan)[:, :T].contiguous(), log_u_BT, torch.from_numpy(total)

    def moments(self, log_v_BE: Tensor, epsilon_B: Tensor) -> tuple[Tensor, Tensor]:
        """Column sums (B, E) of the plan P and ``P^T diag(r)^-1 P`` (B, E, E), each at its own epsilon.

        Only in log form, whose tiles know of no epsilon.
        """
        B, T, E = self.shape
        sums_BE = torch.zeros(B, E, dtype=torch.float64)
        gram_BEE = torch.zeros(B, E, E, dtype=torch.float64)
        log_v, root_BT = log_v_BE.contiguous().numpy(), np.sqrt(self.mass_BT)
        inverses = (1 / epsilon_B).tolist()
        threads = torch.get_num_threads() if T * E >= _SHARE_LOG else 1
        chunk = _MOMENT_TILES * kernels.TILE * (1 if threads == 1 else 4 * threads)
        half_TE = np.empty((min(T, chunk), E))
        unused = np.empty((2, len(half_TE)))  # log-sum-exps and totals
        for b in range(B):
            for start in range(0, T, len(half_TE)):
                rows = min(len(half_TE), T - start)
                half, root = half_TE[:rows], root_BT[b, start:]

                def write(
                    part: tuple[int, int], b: int = b, start: int = start, half: np.ndarray = half
                ) -> None:
                    into = slice(part[0] * kernels.TILE, part[1] * kernels.TILE)
                    tile = start // kernels.TILE
                    kernels.write_plan(
                        self.tiles_BNEL[b],
                        root_BT[b],
                        log_v[b],
                        inverses[b],
                        False,
                        tile + part[0],
                        tile + part[1],
                        half[into],
                        *unused[:, into],
                    )

                run_all(write, split(-(-rows // kernels.TILE), threads))
                part_TE = torch.from_numpy(half)
                gram_BEE[b].addmm_(part_TE.T, part_TE)
                sums_BE[b].addmv_(part_TE.T, torch.from_numpy(root[:rows]))
        return sums_BE, gram_BEE

    def _cut(self, threads: int) -> list[tuple[int, int, int]]:
        """Pieces (problem, first tile, last tile) for so many threads; whole problems if there are enough."""
        B, T, _ = self.shape
        parts = -(-threads // B) if B else 1
        return [(b, *part) for b in range(B) for part in split(-(-T // kernels.TILE), parts)] if T else []
