//! [`panels`]: products of bf16 pairs in the tile registers of AMX, 16 rows of 16 words each.
//!
//! A row of a left tile is 16 pairs, a row of a right tile 16 lanes of one pair each, and a row of accumulators 16
//! lanes. [`MatrixProduct`] has them like that in memory, unless its left operand is stored by columns, which is
//! transposed in the cache.

use super::matrix::{MatrixProduct, ROW};
use super::pair::Bf16Pair;
use super::vector::LANES;
use std::arch::asm;
use std::arch::x86_64::*;
use std::array::from_fn;
use std::cell::RefCell;
use std::ops::Range;
use std::sync::OnceLock;

/// Rows of a tile, and pairs in a row.
const TILE: usize = 16;

/// Whether the processor has bf16 tiles and the system lets this process use them.
pub(super) fn is_available() -> bool {
    static HERE: OnceLock<bool> = OnceLock::new();
    *HERE.get_or_init(|| {
        const BF16: u32 = 1 << 22;
        const TILES: u32 = 1 << 24;
        let found = __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & (BF16 | TILES) == BF16 | TILES;
        found && cfg!(target_os = "linux") && is_allowed()
    })
}

/// Asks Linux to save the tile registers of this process (`ARCH_REQ_XCOMP_PERM`), without which using them is a fault.
fn is_allowed() -> bool {
    const ARCH_PRCTL: usize = 158;
    const REQUEST_PERMISSION: usize = 0x1023;
    const TILE_DATA: usize = 18;
    let status: isize;
    // SAFETY: a system call that reads no memory and only changes what is saved for this process.
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

/// Copies of tiles that are not in memory as a register needs them.
struct TileBuffer {
    left: [[[Bf16Pair; TILE]; TILE]; 2],
    right: [[Bf16Pair; ROW]; TILE],
    /// Whether the tile registers of this thread are configured.
    is_configured: bool,
}

thread_local! {
    static BUFFER: RefCell<TileBuffer> = const {
        RefCell::new(TileBuffer {
            left: [[[Bf16Pair::ZERO; TILE]; TILE]; 2],
            right: [[Bf16Pair::ZERO; ROW]; TILE],
            is_configured: false,
        })
    };
}

/// Configures the tile registers of this thread, which stay configured.
fn configure() {
    let mut row_bytes = [0; 16];
    let mut rows = [0; 16];
    row_bytes[..8].fill(64);
    rows[..8].fill(TILE as u8);
    let config = TileConfig { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows };
    // SAFETY: code with tiles runs only where `is_available` detected them; the configuration is valid and has 64
    // bytes.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly, preserves_flags)) };
}

// Tiles 0 to 3 hold accumulators of two groups of rows and two halves of the lanes, 4 and 5 the left operands of the
// groups, 6 and 7 the right operands of the halves. The compiler uses none of them, so they keep their contents from
// one block of assembly to the next.
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

// Loads or stores the accumulators of one or two groups of rows.
macro_rules! accumulators {
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

/// Computes rows of `product` in whole tiles; returns the first row that is left.
///
/// # Safety
/// The instruction set has tiles, and `checked_count` has checked the product.
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
    assert!(out.len() >= (end - 1) * out_step + ROW, "the output is too short for the matrix product");
    BUFFER.with_borrow_mut(|buffer| {
        if !std::mem::replace(&mut buffer.is_configured, true) {
            configure();
        }
        for first in (0..end).step_by(2 * TILE) {
            // SAFETY: rows before `end` are rows of the product and of `out`; the rest is the caller's promise.
            unsafe {
                let out = out.as_mut_ptr().add(first * out_step);
                match end - first {
                    TILE => panel::<ADD, 1>(product, first, out, out_step, buffer),
                    _ => panel::<ADD, 2>(product, first, out, out_step, buffer),
                }
            }
        }
    });
    end
}

/// Computes `GROUPS` times 16 rows from `first` on.
///
/// # Safety
/// They are rows of the product, which has been checked, and `out` has as many rows of 32 values.
#[target_feature(enable = "avx512f")]
unsafe fn panel<const ADD: bool, const GROUPS: usize>(
    product: &MatrixProduct<'_, Bf16Pair>,
    first: usize,
    out: *mut f32,
    out_step: usize,
    buffer: &mut TileBuffer,
) {
    // SAFETY: the caller's promise.
    unsafe { begin::<ADD, GROUPS>(out, out_step) };
    let mut blocks = InnerBlocks { runs: product.inner, at: 0, row: 0 };
    while let Some(block) = blocks.next() {
        // SAFETY: the inner indices and rows of the block are those of the product.
        unsafe {
            let (low, low_step) = block.left(product, first, &mut buffer.left[0]);
            let (high, high_step) = match GROUPS {
                2 => block.left(product, first + TILE, &mut buffer.left[1]),
                _ => (low, low_step),
            };
            let (b, b_step) = block.right(product, &mut buffer.right);
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
        accumulators!(GROUPS, store, out, out_step);
    }
}

/// Loads the accumulators of `GROUPS` groups of 16 rows, or sets all four tiles to 0.
///
/// # Safety
/// `out` has as many rows of 32 values, and tiles are configured.
#[inline(always)]
unsafe fn begin<const ADD: bool, const GROUPS: usize>(out: *mut f32, out_step: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        if ADD {
            accumulators!(GROUPS, load, out, out_step);
        } else {
            tile!(zero 0);
            tile!(zero 1);
            tile!(zero 2);
            tile!(zero 3);
        }
    }
}

/// Iterates over the inner indices of a product, up to 16 at a time.
struct InnerBlocks<'a> {
    runs: &'a [Range<usize>],
    /// How much of the first run is done.
    at: usize,
    /// The next row of the right operand.
    row: usize,
}

struct InnerBlock {
    inner: InnerRange,
    /// Its first row of the right operand.
    row: usize,
}

/// 16 consecutive indices, or up to 16 others and their count.
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
        let mut inner = [0; TILE];
        let mut count = 0;
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
            self.runs = &self.runs[1..];
            self.at = 0;
        }
    }
}

impl InnerBlock {
    /// Address and stride of its rows of the right operand. Fewer than 16 are copied to `buffer` and filled up with
    /// zeros.
    ///
    /// # Safety
    /// It is a block of `product`, which has been checked.
    #[inline(always)]
    unsafe fn right(
        &self,
        product: &MatrixProduct<'_, Bf16Pair>,
        buffer: &mut [[Bf16Pair; ROW]; TILE],
    ) -> (*const Bf16Pair, usize) {
        let at = self.row * product.b_step;
        match self.inner {
            InnerRange::Scattered(_, count) if count < TILE => {
                let (rows, behind) = buffer.split_at_mut(count);
                for (row, buffer) in rows.iter_mut().enumerate() {
                    buffer.copy_from_slice(&product.b[at + row * product.b_step..][..ROW]);
                }
                behind.fill([Bf16Pair::ZERO; ROW]);
                (buffer.as_ptr().cast(), ROW)
            }
            // SAFETY: the caller's promise.
            _ => (unsafe { product.b.as_ptr().add(at) }, product.b_step),
        }
    }

    /// The same for 16 rows of the left operand from `first` on.
    ///
    /// # Safety
    /// As above, and they are rows of the product; the processor has AVX-512 F.
    #[inline(always)]
    unsafe fn left(
        &self,
        product: &MatrixProduct<'_, Bf16Pair>,
        first: usize,
        buffer: &mut [[Bf16Pair; TILE]; TILE],
    ) -> (*const Bf16Pair, usize) {
        let a = product.a;
        let corner = first * a.row_step;
        match self.inner {
            // SAFETY: the caller's promise.
            InnerRange::Whole(inner) if a.inner_step == 1 => unsafe {
                return (a.values.as_ptr().add(corner + inner), a.row_step);
            },
            // SAFETY: the caller's promise: the 16 rows of a column are consecutive.
            InnerRange::Whole(inner) if a.row_step == 1 => unsafe {
                let column = |k: usize| a.values.as_ptr().add(corner + (inner + k) * a.inner_step);
                transpose(from_fn(column), buffer);
            },
            // SAFETY: as above.
            InnerRange::Scattered(inner, count) if a.row_step == 1 => unsafe {
                const NONE: [Bf16Pair; TILE] = [Bf16Pair::ZERO; TILE];
                let column = |k: usize| match k < count {
                    true => a.values.as_ptr().add(corner + inner[k] * a.inner_step),
                    false => NONE.as_ptr(),
                };
                transpose(from_fn(column), buffer);
            },
            _ => {
                for (row, buffer) in buffer.iter_mut().enumerate() {
                    *buffer = self.gather(&a.values[corner + row * a.row_step..], a.inner_step);
                }
            }
        }
        (buffer.as_ptr().cast(), TILE)
    }

    /// Its elements of one row of the left operand.
    #[inline(always)]
    fn gather(&self, row: &[Bf16Pair], step: usize) -> [Bf16Pair; TILE] {
        from_fn(|k| match self.inner {
            InnerRange::Whole(inner) => row[(inner + k) * step],
            InnerRange::Scattered(inner, count) if k < count => row[inner[k] * step],
            InnerRange::Scattered(..) => Bf16Pair::ZERO,
        })
    }
}

/// Transposes 16 columns of 16 pairs: squares of 4 x 4 are loaded side by side and transposed in registers.
///
/// # Safety
/// Each column has 16 pairs.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn transpose(columns: [*const Bf16Pair; TILE], to: &mut [[Bf16Pair; TILE]; TILE]) {
    for (block, rows) in to.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        let quarter = |column: usize| unsafe { _mm_loadu_si128(columns[column].add(4 * block).cast()) };
        let squares = |first: usize| {
            let low = _mm512_inserti32x4::<1>(_mm512_castsi128_si512(quarter(first)), quarter(first + 4));
            _mm512_inserti32x4::<3>(_mm512_inserti32x4::<2>(low, quarter(first + 8)), quarter(first + 12))
        };
        let a = squares(0);
        let b = squares(1);
        let c = squares(2);
        let d = squares(3);
        let low_ab = _mm512_unpacklo_epi32(a, b);
        let high_ab = _mm512_unpackhi_epi32(a, b);
        let low_cd = _mm512_unpacklo_epi32(c, d);
        let high_cd = _mm512_unpackhi_epi32(c, d);
        let transposed = [
            _mm512_unpacklo_epi64(low_ab, low_cd),
            _mm512_unpackhi_epi64(low_ab, low_cd),
            _mm512_unpacklo_epi64(high_ab, high_cd),
            _mm512_unpackhi_epi64(high_ab, high_cd),
        ];
        for (row, transposed) in rows.iter_mut().zip(transposed) {
            // SAFETY: a row is 16 pairs of 32 bits.
            unsafe { _mm512_storeu_si512(row.as_mut_ptr().cast(), transposed) };
        }
    }
}
