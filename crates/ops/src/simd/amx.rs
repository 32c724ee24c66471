//! [`panels`]: products of bf16 pairs in the tile registers of AMX, 16 rows of 16 words each. Knows no operation.
//!
//! A row of a left tile is 16 pairs, a row of a right tile 16 lanes of one pair, and a row of sums 16 lanes: as
//! [`MatrixProduct`] has them in memory, unless its left side stands by columns. Those are turned over in the cache.

use super::{Bf16Pair, LANES, MatrixProduct, ROW};
use std::arch::asm;
use std::arch::x86_64::*;
use std::array::from_fn;
use std::cell::RefCell;
use std::ops::Range;
use std::sync::OnceLock;

/// Rows of a tile, and pairs of one of its rows.
const TILE: usize = 16;

/// Whether the processor has tiles of bf16 and the system lets this process use them.
pub(super) fn is_here() -> bool {
    static HERE: OnceLock<bool> = OnceLock::new();
    *HERE.get_or_init(|| {
        const BF16: u32 = 1 << 22;
        const TILES: u32 = 1 << 24;
        let found = __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & (BF16 | TILES) == BF16 | TILES;
        found && cfg!(target_os = "linux") && is_allowed()
    })
}

/// Asks Linux for the state of tiles, which a process has no room for before.
fn is_allowed() -> bool {
    const ARCH_PRCTL: usize = 158;
    const REQUEST_PERMISSION: usize = 0x1023;
    const TILE_DATA: usize = 18;
    let status: isize;
    // SAFETY: a system call that reads no memory and changes what is saved for this process alone.
    unsafe {
        asm!("syscall", inlateout("rax") ARCH_PRCTL => status, in("rdi") REQUEST_PERMISSION, in("rsi") TILE_DATA,
            lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    status == 0
}

/// The shape of the eight tiles, as LDTILECFG reads it.
#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Tiles that do not stand in memory as a register takes them.
struct TileBuffer {
    left: [[[Bf16Pair; TILE]; TILE]; 2],
    right: [[Bf16Pair; ROW]; TILE],
    /// Whether the tiles of this thread have their shape.
    is_configured: bool,
}

thread_local! {
    static SPACE: RefCell<TileBuffer> = const {
        RefCell::new(TileBuffer {
            left: [[[Bf16Pair::ZERO; TILE]; TILE]; 2],
            right: [[Bf16Pair::ZERO; ROW]; TILE],
            is_configured: false,
        })
    };
}

/// Gives this thread's tiles their shape; they keep it.
fn configure() {
    let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
    row_bytes[..8].fill(64);
    rows[..8].fill(TILE as u8);
    let shapes = TileConfig { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows };
    // SAFETY: `is_here` found tiles before there was a level that has them; the shapes are valid and of 64 bytes.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const shapes, options(nostack, readonly, preserves_flags)) };
}

// Tiles 0 to 3 hold sums, of two groups of rows and two halves of the lanes; 4 and 5 the groups' left sides, 6 and 7 the
// halves' right sides. No compiler uses them, so what is in them lasts from one block of assembly to the next.
macro_rules! tile {
    (load $tile:literal, $from:expr, $step:expr) => {
        asm!(concat!("tileloadd tmm", $tile, ", [{} + {}]"), in(reg) $from, in(reg) 4 * $step,
            options(nostack, readonly, preserves_flags))
    };
    (store $tile:literal, $to:expr, $step:expr) => {
        asm!(concat!("tilestored [{} + {}], tmm", $tile), in(reg) $to, in(reg) 4 * $step,
            options(nostack, preserves_flags))
    };
    (zero $tile:literal) => {
        asm!(concat!("tilezero tmm", $tile), options(nomem, nostack, preserves_flags))
    };
    (multiply $sums:literal, $left:literal, $right:literal) => {
        asm!(concat!("tdpbf16ps tmm", $sums, ", tmm", $left, ", tmm", $right), options(nomem, nostack, preserves_flags))
    };
}

// Loads or stores the sums of one or two groups of rows.
macro_rules! sums {
    ($groups:expr, $action:ident, $out:expr, $step:expr) => {
        tile!($action 0, $out, $step);
        tile!($action 1, $out.add(LANES), $step);
        if $groups == 2 {
            let second = $out.add(TILE * $step);
            tile!($action 2, second, $step);
            tile!($action 3, second.add(LANES), $step);
        }
    };
}

/// Computes rows of `product` by whole tiles; gives back the first that is left.
///
/// # Safety
/// The level has tiles, and `checked_count` found the product's extents inside its slices.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn panels<const ADD: bool>(
    product: &MatrixProduct<'_, Bf16Pair>,
    out: &mut [f32],
    out_step: usize,
) -> usize {
    let end = product.rows / TILE * TILE;
    if end == 0 {
        return 0;
    }
    assert!(out.len() >= (end - 1) * out_step + ROW, "a product's output is shorter than its extents");
    SPACE.with_borrow_mut(|space| {
        if !std::mem::replace(&mut space.is_configured, true) {
            configure();
        }
        for first in (0..end).step_by(2 * TILE) {
            // SAFETY: rows before `end` are rows of the product and of `out`; the caller's promise.
            unsafe {
                let out = out.as_mut_ptr().add(first * out_step);
                match end - first {
                    TILE => panel::<ADD, 1>(product, first, out, out_step, space),
                    _ => panel::<ADD, 2>(product, first, out, out_step, space),
                }
            }
        }
    });
    end
}

/// `GROUPS` times 16 rows from `first` on.
///
/// # Safety
/// They are rows of the product, whose extents were checked, and `out` has as many rows of 32 numbers.
#[target_feature(enable = "avx512f")]
unsafe fn panel<const ADD: bool, const GROUPS: usize>(
    product: &MatrixProduct<'_, Bf16Pair>,
    first: usize,
    out: *mut f32,
    out_step: usize,
    space: &mut TileBuffer,
) {
    // SAFETY: the caller's promise.
    unsafe {
        if ADD {
            sums!(GROUPS, load, out, out_step);
        } else {
            tile!(zero 0);
            tile!(zero 1);
            tile!(zero 2);
            tile!(zero 3);
        }
    }
    let mut blocks = InnerBlocks { runs: product.inner, at: 0, row: 0 };
    while let Some(block) = blocks.next() {
        // SAFETY: the block's inner indices are the product's, and so are the rows.
        unsafe {
            let (low, low_step) = block.left(product, first, &mut space.left[0]);
            let (high, high_step) = match GROUPS {
                2 => block.left(product, first + TILE, &mut space.left[1]),
                _ => (low, low_step),
            };
            let (b, b_step) = block.right(product, &mut space.right);
            tile!(load 6, b, b_step);
            tile!(load 7, b.add(LANES), b_step);
            tile!(load 4, low, low_step);
            tile!(multiply 0, 4, 6);
            tile!(multiply 1, 4, 7);
            if GROUPS == 2 {
                tile!(load 5, high, high_step);
                tile!(multiply 2, 5, 6);
                tile!(multiply 3, 5, 7);
            }
        }
    }
    // SAFETY: the caller's promise.
    unsafe {
        sums!(GROUPS, store, out, out_step);
    }
}

/// Inner indices of a product, up to 16 at a time.
struct InnerBlocks<'a> {
    runs: &'a [Range<usize>],
    /// How much of the first run is behind.
    at: usize,
    /// The row of the right side that comes next.
    row: usize,
}

struct InnerBlock {
    inner: InnerRange,
    /// First row of its right side.
    row: usize,
}

/// 16 indices that follow each other, or as many as there are.
enum InnerRange {
    Whole(usize),
    Scattered([usize; TILE], usize),
}

impl InnerBlocks<'_> {
    #[inline(always)]
    fn next(&mut self) -> Option<InnerBlock> {
        let row = self.row;
        let whole = self.runs.first()?.start + self.at;
        if whole + TILE <= self.runs[0].end {
            self.step(TILE);
            self.row += TILE;
            return Some(InnerBlock { inner: InnerRange::Whole(whole), row });
        }
        let (mut inner, mut count) = ([0; TILE], 0);
        while count < TILE
            && let Some(run) = self.runs.first()
        {
            if run.start + self.at < run.end {
                inner[count] = run.start + self.at;
                count += 1;
            }
            self.step(1);
        }
        self.row += count;
        (count > 0).then_some(InnerBlock { inner: InnerRange::Scattered(inner, count), row })
    }

    #[inline(always)]
    fn step(&mut self, by: usize) {
        self.at += by;
        if self.runs.first().is_some_and(|run| run.start + self.at >= run.end) {
            (self.runs, self.at) = (&self.runs[1..], 0);
        }
    }
}

impl InnerBlock {
    /// Where its rows of the right side stand, and how far apart; in `space`, with zeros behind them, if they are few.
    ///
    /// # Safety
    /// It is a block of `product`, whose extents were checked.
    #[inline(always)]
    unsafe fn right(
        &self,
        product: &MatrixProduct<'_, Bf16Pair>,
        space: &mut [[Bf16Pair; ROW]; TILE],
    ) -> (*const Bf16Pair, usize) {
        let at = self.row * product.b_step;
        match self.inner {
            InnerRange::Scattered(_, count) if count < TILE => {
                let (rows, behind) = space.split_at_mut(count);
                for (row, space) in rows.iter_mut().enumerate() {
                    space.copy_from_slice(&product.b[at + row * product.b_step..][..ROW]);
                }
                behind.fill([Bf16Pair::ZERO; ROW]);
                (space.as_ptr().cast(), ROW)
            }
            // SAFETY: the caller's promise.
            _ => (unsafe { product.b.as_ptr().add(at) }, product.b_step),
        }
    }

    /// The same of 16 rows of the left side from `first` on.
    ///
    /// # Safety
    /// As above, and they are rows of the product; the processor has AVX-512 F.
    #[inline(always)]
    unsafe fn left(
        &self,
        product: &MatrixProduct<'_, Bf16Pair>,
        first: usize,
        space: &mut [[Bf16Pair; TILE]; TILE],
    ) -> (*const Bf16Pair, usize) {
        let a = product.a;
        let corner = first * a.row_step;
        match self.inner {
            // SAFETY: the caller's promise.
            InnerRange::Whole(inner) if a.inner_step == 1 => unsafe {
                return (a.values.as_ptr().add(corner + inner), a.row_step);
            },
            // SAFETY: the caller's promise: 16 rows stand side by side.
            InnerRange::Whole(inner) if a.row_step == 1 => unsafe {
                let column = |k: usize| a.values.as_ptr().add(corner + (inner + k) * a.inner_step);
                turn_over(from_fn(column), space);
            },
            // SAFETY: as above.
            InnerRange::Scattered(inner, count) if a.row_step == 1 => unsafe {
                const NONE: [Bf16Pair; TILE] = [Bf16Pair::ZERO; TILE];
                let column = |k: usize| match k < count {
                    true => a.values.as_ptr().add(corner + inner[k] * a.inner_step),
                    false => NONE.as_ptr(),
                };
                turn_over(from_fn(column), space);
            },
            _ => {
                for (row, space) in space.iter_mut().enumerate() {
                    let at = |inner: usize| a.values[corner + row * a.row_step + inner * a.inner_step];
                    *space = from_fn(|k| match self.inner {
                        InnerRange::Whole(inner) => at(inner + k),
                        InnerRange::Scattered(inner, count) if k < count => at(inner[k]),
                        InnerRange::Scattered(..) => Bf16Pair::ZERO,
                    });
                }
            }
        }
        (space.as_ptr().cast(), TILE)
    }
}

/// Columns of 16 pairs as rows: squares of four columns by four are loaded side by side and turned over in place.
///
/// # Safety
/// 16 pairs stand at each column.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn turn_over(columns: [*const Bf16Pair; TILE], to: &mut [[Bf16Pair; TILE]; TILE]) {
    for (block, rows) in to.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        let quarter = |column: usize| unsafe { _mm_loadu_si128(columns[column].add(4 * block).cast()) };
        let squares = |first: usize| {
            let low = _mm512_inserti32x4::<1>(_mm512_castsi128_si512(quarter(first)), quarter(first + 4));
            _mm512_inserti32x4::<3>(_mm512_inserti32x4::<2>(low, quarter(first + 8)), quarter(first + 12))
        };
        let (a, b, c, d) = (squares(0), squares(1), squares(2), squares(3));
        let (low_ab, high_ab) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let (low_cd, high_cd) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
        let turned = [
            _mm512_unpacklo_epi64(low_ab, low_cd),
            _mm512_unpackhi_epi64(low_ab, low_cd),
            _mm512_unpacklo_epi64(high_ab, high_cd),
            _mm512_unpackhi_epi64(high_ab, high_cd),
        ];
        for (row, turned) in rows.iter_mut().zip(turned) {
            // SAFETY: a row is 16 pairs of 32 bits.
            unsafe { _mm512_storeu_si512(row.as_mut_ptr().cast(), turned) };
        }
    }
}
