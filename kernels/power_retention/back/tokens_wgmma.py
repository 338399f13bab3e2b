"""The two kernels of the backward pass that go over tiles of tokens, by wgmma on Hopper: as `tokens`, with `power_back_wgmma.cuh`.

Of float16 only the products with the state are wgmma: it takes tokens as they are stored, and a gradient of scores needs the range of bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vidrial import Arguments, Cost, Device, DType, Kernel, Tiles, choice
from vidrial.kernels.power_retention import pace
from vidrial.kernels.power_retention.back import tokens
from vidrial.kernels.power_retention.back.problem import ChunkedGradient
from vidrial.layout import LoadMatrix, Occupancy, Pipeline, SharedMemory, SmemLayout, WarpgroupMma, gradient_tiles, ldmatrix
from vidrial.templates import TEMPLATES


@dataclass(frozen=True)
class Config(tokens.Config):
    """As by mma.sync; `dx`: where the gradient of the features is while the state passes by."""

    warps: int = choice(4, 8)
    stages: int = choice(3, 4, 2)
    dx: str = choice("shared", "registers")


# Seconds, fitted to what the kernels' parts took on the H200, each by itself and only with a state: an SM's for the contraction of a 64 x 64 tile
# beside its products, a warpgroup's for a tile that it has to itself, and an SM's for a weight and its gradient, without values' gradients and with.
CONTRACTION, TILE_STEP, WEIGHT = 84e-9, {"shared": 390e-9, "registers": 140e-9}, (60e-12, 85e-12)
# A block of tokens of a warpgroup that has the SM to itself, in times of what it keeps the SM busy; first loads and last stores; what the state takes
# for each further warpgroup of a CTA, in times of one's. NOTE: guesses, as what a stage of the state adds, until a sweep has been fitted.
BLOCK_ALONE, OUTPUT, CROWDED, STAGE = 1.6, 0.1e-6, 0.3, 20e-9
# Bytes of the ring that the state's stages may take: of two CTAs per SM, and of three.
STATE_BYTES, STATE_BYTES_OF_THREE = 65536, 49152


def wgmma_blocks(p: ChunkedGradient) -> bool:
    """Whether blocks of tokens are multiplied by wgmma, too."""
    return p.dtype == DType.bfloat16


def band(p: ChunkedGradient) -> int:
    """Warps that multiply a block of tokens together."""
    return 4 if wgmma_blocks(p) else 1


def kept(c: Config) -> bool:
    return c.dx == "registers"


def over_w(p: ChunkedGradient, c: Config) -> bool:
    """Whether the gradient of the features lies where w was, which is in registers meanwhile, as bfloat16."""
    return p.stateful and not kept(c) and p.dtype == DType.bfloat16


def state_tiles(p: ChunkedGradient, c: Config) -> int:
    """Pair tiles in a stage of the ring."""
    room = (STATE_BYTES_OF_THREE if c.blocks > 2 else STATE_BYTES) // c.stages
    return max((n for n in (2, 3, 4) if p.pair_tiles % n == 0 and n * 128 * p.e <= room), default=1)


def tiles(p: ChunkedGradient, c: Config, values: bool) -> Tiles:
    threads, groups, bf16 = 32 * c.warps, c.warps // 4, DType.bfloat16
    x, w = SmemLayout(p.dtype, c.rows, p.d), SmemLayout(p.dtype, c.rows, p.e)
    a, b = SmemLayout(p.dtype, c.block, p.d, stages=c.stages), SmemLayout(p.dtype, c.block, p.e, stages=c.stages)
    z_rows, s_tiles = min(64, p.d), state_tiles(p, c)
    s, z = SmemLayout(bf16, 64, p.e), SmemLayout(bf16, z_rows, p.d)
    stage_bytes = max(a.bytes + b.bytes, s_tiles * s.bytes * p.stateful, z.bytes * p.stateful)
    members = gradient_tiles(x, w, a, b, c.warps).members
    if wgmma_blocks(p):
        members |= {
            "XA": WarpgroupMma(bf16, groups, (c.rows, c.block, p.d), a, x),
            "WB": WarpgroupMma(bf16, groups, (c.rows, c.block, p.e), b, w),
            "DX": WarpgroupMma(bf16, groups, (c.rows, p.d, c.block), a.transposed),
            "DW": WarpgroupMma(bf16, groups, (c.rows, p.e, c.block), b.transposed),
        }
    if values:
        members["PS"] = WarpgroupMma(bf16, groups, (c.rows, p.e, 64), s.transposed)

    def operand(tile: SmemLayout) -> LoadMatrix:
        steps = tuple((0, k) for k in range(0, tile.columns, 16))
        return LoadMatrix(tile, ldmatrix(4), threads, lambda t: (t // 32 * 16 + t % 16, t % 32 // 16 * 8), steps)

    dx_bytes = threads * p.d * 2
    apart = {"Dx": dx_bytes} if p.stateful and not kept(c) and not over_w(p, c) else {}
    w_stages = -(-dx_bytes // w.bytes) if over_w(p, c) else 1
    return Tiles(
        threads=threads,
        min_blocks=c.blocks,
        smem=SharedMemory(X=x, W=(w, w_stages), Ring=c.stages * stage_bytes, Table=16 * c.block * c.stages, **apart),
        Elem=p.dtype,
        values=values,
        wgmma_blocks=wgmma_blocks(p),
        dx_kept=kept(c),
        dx_over_w=over_w(p, c),
        rows=c.rows,
        stage_bytes=stage_bytes,
        s_tiles=s_tiles,
        s_stages=p.pair_tiles // s_tiles,
        z_rows=z_rows,
        z_stages=p.d // z_rows if p.normalized else 0,
        **members,
        # Kept in registers, the state's next stage is multiplied while the one before it is contracted.
        Ring=Pipeline(c.stages, read=2 if kept(c) else 1),
        WS=WarpgroupMma(bf16, groups, (c.rows, 64, p.e), s),
        XZ=WarpgroupMma(bf16, groups, (c.rows, z_rows, p.d), z),
        RowsW=operand(w),
        RowsX=operand(x),
        **tokens.state_members(x, s, z, threads),
    )


def rules(p: ChunkedGradient, c: Config, device: Device, values: bool) -> Iterator[tuple[bool, str]]:
    yield device.arch == "sm_90a", f"wgmma is an instruction of sm_90a; {device.name} is {device.arch}"
    yield wgmma_blocks(p) or p.stateful, f"wgmma has no products of {p.dtype} but those with a state"
    yield not kept(c) or p.stateful, "dx=registers: there is no state"
    yield not kept(c) or not values, "dx=registers: the gradients of keys and values have none left"
    yield not kept(c) or p.d <= 64, f"dx=registers: 64 features at most are unrolled; got d={p.d}"
    yield not kept(c) or c.stages > 2, f"stages={c.stages}: dx=registers reads two of them at once"
    yield p.chunk % c.rows == 0, f"the {c.rows} rows of a CTA must divide chunk={p.chunk}"
    yield c.rows % c.block == 0, f"block={c.block} must divide the {c.rows} rows of a CTA"
    registers = min(255, device.registers_per_sm // (32 * c.warps * c.blocks) // 8 * 8)
    roomy = not values or c.blocks < 3 or (p.gated and p.normalized) or (c.stages == 2 and c.block == 32 and p.d == p.e == 64)
    yield roomy, f"blocks={c.blocks} stages={c.stages} block={c.block}: without gates or a normaliser that spills 4 to 8 bytes"
    needed = least_registers(p, c, values)
    yield (
        needed <= registers,
        f"ptxas needs some {needed} registers per thread: {c.blocks} CTAs of {c.warps} warps per SM leave {registers}",
    )


def least_registers(p: ChunkedGradient, c: Config, values: bool) -> int:
    """Registers per thread that ptxas makes do with, without a spill: seen in its reports. 256: it never does."""
    wide, half = (p.d == 128) + 2 * (p.e == 128), p.dtype == DType.float16
    if kept(c):
        return 256 if p.e == 128 else 168 if p.d == 32 else 216
    if values and c.block == 64:
        return 256 if wide else 240
    if values:
        return (184 if p.degree == 4 else 168, 208, 252, 256 if half and c.block > 16 else 250)[wide]
    return (127, 168, 168, 184)[wide] if c.block < 64 else 208 if wide else 168


def taken_registers(p: ChunkedGradient, c: Config, device: Device, values: bool) -> int:
    """Registers per thread that ptxas takes where it is free to, or as many as it may."""
    limit = min(255, device.registers_per_sm // (32 * c.warps * c.blocks) // 8 * 8)
    return min(limit, max(least_registers(p, c, values), 214 if values else 150))


def cost(p: ChunkedGradient, c: Config, device: Device, values: bool) -> Cost:
    done, heads, group = tokens.work(p, c, values, band(p)), p.b * (p.h if values else p.hq), p.group if values else 1
    per_block, per_state = tokens.block_flops(p, c, values), c.rows * tokens.state_flops(p, values)
    flops = heads * (group * done.blocks * per_block + done.stateful_rows * tokens.state_flops(p, values))
    ctas = done.rows // c.rows * heads
    waited, states = group * done.blocks / c.warps / (done.rows / c.rows), done.stateful_rows / done.rows
    # What an SM is busy with, and what a warpgroup takes that has it to itself.
    rate, warpgroups = device.tensor_tflops * 1e12 / device.sms, c.warps // 4
    contracted, weights = warpgroups * p.pair_tiles, c.rows * c.block
    block = c.warps * per_block / rate + WEIGHT[values] * weights
    state = per_state / rate + CONTRACTION * contracted
    busy = OUTPUT * warpgroups + waited * block + states * state
    state_alone = (
        per_state / rate / warpgroups
        + TILE_STEP[c.dx] * p.pair_tiles
        + STAGE * p.pair_tiles / state_tiles(p, c)
        + CROWDED * (warpgroups - 1) * state / warpgroups
    )
    block_alone = BLOCK_ALONE * block + (pace.FETCH if c.stages < 3 and not p.stateful else 0.0)
    longest = min(p.chunk, p.t) / c.block * group * block_alone + p.stateful * state_alone
    alone = OUTPUT * warpgroups + waited * block_alone + states * state_alone
    return Cost(
        flops=flops,
        bytes=tokens.moved(p, done, values),
        ctas=ctas,
        ctas_per_sm=ctas_per_sm(p, c, device, values),
        efficiency=flops / max(1, ctas) / (rate * busy) if flops else 1.0,
        alone=alone,
        longest=(OUTPUT * warpgroups + longest) / alone,
        uneven=True,
    )


def ctas_per_sm(p: ChunkedGradient, c: Config, device: Device, values: bool) -> int:
    """CTAs that an SM holds at once, by their shared memory and an estimate of their registers."""
    stage = max(tokens.block_bytes(p, c), p.stateful * max(state_tiles(p, c) * 128 * p.e, 2 * min(64, p.d) * p.d))
    rows = c.rows * (p.dtype.bytes * p.d + max(p.dtype.bytes * p.e, 4 * p.d * over_w(p, c)))
    apart = 4 * c.rows * p.d * (p.stateful and not kept(c) and not over_w(p, c))
    smem = rows + apart + c.stages * (stage + 16 * c.block)
    return max(1, Occupancy.of(device, threads=32 * c.warps, smem=smem, registers=taken_registers(p, c, device, values)).ctas)


def _kernel(name: str, args: Arguments, values: bool) -> Kernel[ChunkedGradient, Config]:
    return Kernel(
        name,
        Path(TEMPLATES, "power_retention", f"{name}.cu.j2"),
        ChunkedGradient,
        Config,
        args,
        lambda p, c: tiles(p, c, values),
        lambda p, c: tokens.grid(p, c, values),
        lambda p, c, device: rules(p, c, device, values),
        lambda p, c, device: cost(p, c, device, values),
    )


power_back_query_wgmma = _kernel("power_back_query_wgmma", tokens.QUERY_ARGS, values=False)
power_back_keys_wgmma = _kernel("power_back_keys_wgmma", tokens.KEYS_ARGS, values=True)
