//! [`TensorMap`]: a tensor in memory and the box that a copy takes of it, as `cuTensorMapEncodeTiled` packs them for a
//! kernel; and those copies.

use crate::device::device;
use crate::driver::{INVALID_VALUE, OK, interface};
use crate::instruction::{Instruction, Lanes, Space};
use crate::memory::{Allocations, find, resolve, within};
use crate::report;
use crate::warp::{Block, Warp, lanes_of};
use std::array::from_fn;
use std::ffi::{c_int, c_void};
use std::ops::Range;
use std::ptr::copy_nonoverlapping;
use std::slice::from_raw_parts;

/// Numbers have two bytes: integers, f16 and bf16.
const NUMBER: u64 = 2;
/// The most bytes of a box's row.
const ROW: usize = 256 * NUMBER as usize;
const MAGIC: u64 = 0x70a6_6e15_0f7e_5005;

/// As it lies in memory; dimensions that a tensor lacks have one element.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct TensorMap {
    magic: u64,
    address: u64,
    sizes: [u64; 5],
    /// From one element to the next, in bytes.
    strides: [u64; 5],
    /// Of the box.
    sides: [u16; 5],
    rank: u8,
    /// 0 if not.
    swizzled: u8,
    unused: [u8; 20],
}

/// What a map is made of.
struct Asked<'a> {
    kind: c_int,
    address: u64,
    sizes: &'a [u64],
    strides: &'a [u64],
    sides: &'a [u32],
    steps: &'a [u32],
    /// Interleave, swizzle, promotion to the cache, and what lies outside.
    modes: [c_int; 4],
}

impl Asked<'_> {
    /// What the driver refuses, or is not simulated.
    fn problem(&self) -> Option<&'static str> {
        let row = u64::from(self.sides[0]) * NUMBER;
        let all = [
            (device().capability >= 90, "the device has no copies of boxes"),
            (matches!(self.kind, 1 | 6 | 9), "numbers of other than two bytes are not simulated"),
            (self.modes[0] == 0, "interleaved tensors are not simulated"),
            (matches!(self.modes[1], 0 | 3), "swizzles other than of 128 bytes are not simulated"),
            (matches!(self.modes[2], 0..=3), "the promotion to the cache is none of 0 to 3"),
            (self.modes[3] == 0, "a fill other than zeros is not simulated"),
            (self.address.is_multiple_of(16), "the tensor begins at no multiple of 16 bytes"),
            (self.sizes.iter().all(|size| (1..=1 << 32).contains(size)), "a dimension is not of 1 to 2^32"),
            (
                self.strides.iter().all(|one| one.is_multiple_of(16) && *one < 1 << 40),
                "a stride is no multiple of 16 < 2^40",
            ),
            (self.sides.iter().all(|side| (1..=256).contains(side)), "a side of the box is not of 1 to 256"),
            (self.steps.iter().all(|step| *step == 1), "steps other than 1 are not simulated"),
            (row.is_multiple_of(16), "a row of the box is no multiple of 16 bytes"),
            (self.modes[1] == 0 || row <= 128, "a row of the box is longer than the swizzle"),
            (self.modes[1] == 0 || row >= 128, "a row of the box that is shorter than the swizzle is not simulated"),
        ];
        all.into_iter().find_map(|(holds, text)| (!holds).then_some(text))
    }
}

impl TensorMap {
    fn new(asked: &Asked) -> Self {
        let rank = asked.sizes.len();
        Self {
            magic: MAGIC,
            address: asked.address,
            sizes: from_fn(|axis| asked.sizes.get(axis).copied().unwrap_or(1)),
            strides: from_fn(|axis| if axis == 0 { NUMBER } else { asked.strides.get(axis - 1).copied().unwrap_or(0) }),
            sides: from_fn(|axis| asked.sides.get(axis).map_or(1, |side| *side as u16)),
            rank: rank as u8,
            swizzled: u8::from(asked.modes[1] != 0),
            unused: [0; 20],
        }
    }

    fn row_bytes(&self) -> usize {
        usize::from(self.sides[0]) * NUMBER as usize
    }

    fn rows(&self) -> usize {
        self.sides[1..].iter().map(|side| usize::from(*side)).product()
    }
}

interface! {
    fn cuTensorMapEncodeTiled(
        map: *mut TensorMap, kind: c_int, rank: u32, address: *mut c_void, sizes: *const u64, strides: *const u64,
        sides: *const u32, steps: *const u32, interleave: c_int, swizzle: c_int, promotion: c_int, fill: c_int
    ) {
        let strided = rank.saturating_sub(1) as usize;
        let missing = sizes.is_null() || sides.is_null() || steps.is_null() || strided > 0 && strides.is_null();
        if missing || map.is_null() || !(map as usize).is_multiple_of(64) || !(1..=5).contains(&rank) {
            report::problem("a tensor's map is misaligned or not of 1 to 5 dimensions, or an argument is missing");
            return INVALID_VALUE;
        }
        let rank = rank as usize;
        // SAFETY: not null, and as long as the caller's rank says.
        let (sizes, sides, steps) = unsafe { (from_raw_parts(sizes, rank), from_raw_parts(sides, rank), from_raw_parts(steps, rank)) };
        // SAFETY: as above; of one dimension there are none.
        let strides = if strided > 0 { unsafe { from_raw_parts(strides, strided) } } else { &[] };
        let modes = [interleave, swizzle, promotion, fill];
        let asked = Asked { kind, address: address as u64, sizes, strides, sides, steps, modes };
        if let Some(problem) = asked.problem() {
            report::problem(&format!("a tensor's map: {problem}"));
            return INVALID_VALUE;
        }
        // SAFETY: the caller gives room for 128 bytes.
        unsafe { map.write(TensorMap::new(&asked)) };
        OK
    }
}

/// A copy of a box to shared memory.
pub struct BoxCopy {
    map: TensorMap,
    /// Where the box begins in the tensor.
    from: [i64; 5],
    to: u64,
    /// At which barrier it arrives.
    pub barrier: u64,
    /// The instruction, for messages.
    pub text: String,
}

impl BoxCopy {
    /// Of the box, whether it lies in the tensor or not.
    pub fn bytes(&self) -> usize {
        self.map.row_bytes() * self.map.rows()
    }

    /// In shared memory.
    pub fn place(&self) -> Range<u64> {
        self.to..self.to + self.bytes() as u64
    }

    fn begin(self, block: &mut Block) -> Result<(), String> {
        // Rows change places in groups of eight, from a multiple of so many bytes.
        let align = if self.map.swizzled == 0 { 128 } else { 1024 };
        if !self.to.is_multiple_of(align) {
            return Err(format!("{:#x} is no multiple of {align}", self.to));
        }
        let place = within(block.shared.len(), self.to, self.bytes() as u64)
            .ok_or_else(|| format!("{:?} is outside of {} bytes of shared memory", self.place(), block.shared.len()))?;
        block.barriers.begin_copy(self)?;
        block.shared[place].fill(0xff);
        Ok(())
    }

    /// Row by row; what lies outside of the tensor becomes zeros.
    pub fn land(&self, shared: &mut [u8], allocations: &Allocations) -> Result<(), String> {
        let bytes = self.map.row_bytes();
        for number in 0..self.map.rows() {
            let row = self.row(number, allocations)?;
            for (at, piece) in row[..bytes].chunks_exact(16).enumerate() {
                let linear = self.to + (number * bytes + at * 16) as u64;
                let place = if self.map.swizzled == 0 { linear } else { swizzled(linear) };
                shared[place as usize..][..16].copy_from_slice(piece);
            }
        }
        Ok(())
    }

    fn row(&self, number: usize, allocations: &Allocations) -> Result<[u8; ROW], String> {
        let (map, mut row) = (&self.map, [0; ROW]);
        let (mut rest, mut begin) = (number as u64, i128::from(map.address));
        for axis in 1..5 {
            let side = u64::from(map.sides[axis]);
            let at = self.from[axis] + (rest % side) as i64;
            if !(0..map.sizes[axis] as i64).contains(&at) {
                return Ok(row);
            }
            (rest, begin) = (rest / side, begin + i128::from(at) * i128::from(map.strides[axis]));
        }
        let (first, size) = (self.from[0], map.sizes[0] as i64);
        let inside = first.clamp(0, size)..(first + i64::from(map.sides[0])).clamp(0, size);
        let bytes = (inside.end - inside.start) as u64 * NUMBER;
        if bytes > 0 {
            let address = (begin + i128::from(inside.start) * i128::from(NUMBER)) as u64;
            find(allocations, address, bytes).ok_or_else(|| format!("{address:#x} is outside of what is allocated"))?;
            let to = &mut row[((inside.start - first) as u64 * NUMBER) as usize..];
            // SAFETY: so many bytes are allocated there, and a row has room for a box's.
            unsafe { copy_nonoverlapping(address as *const u8, to.as_mut_ptr(), bytes as usize) };
        }
        Ok(row)
    }
}

impl Warp {
    /// Each lane begins a copy; what lies there is no numbers until it lands.
    pub(crate) fn copy_box(&mut self, block: &mut Block, instruction: &Instruction, active: u32) -> Result<(), String> {
        let operands = &instruction.from;
        let [to, maps, barriers] = [0, 2, 4].map(|at| self.addresses(block, operands[at], operands[at + 1]));
        let from: Vec<Lanes> = operands[6..].iter().map(|one| self.read(block, *one)).collect();
        for lane in lanes_of(active) {
            let map = self.tensor_map(block, lane, maps[lane])?;
            if usize::from(map.rank) != from.len() {
                return Err(format!("lane {lane}: the map is of {} dimensions", map.rank));
            }
            let barrier = block.barrier(Space::Shared, lane, barriers[lane])?;
            let from = from_fn(|axis| from.get(axis).map_or(0, |one| i64::from(one[lane] as i32)));
            let (to, text) = (resolve(Space::Shared, to[lane]).1, instruction.text.clone());
            let copy = BoxCopy { map, from, to, barrier, text };
            copy.begin(block).map_err(|problem| format!("lane {lane}: {problem}"))?;
        }
        Ok(())
    }

    fn tensor_map(&mut self, block: &mut Block, lane: usize, address: u64) -> Result<TensorMap, String> {
        let memory = self.place(block, Space::Generic, lane, address, size_of::<TensorMap>() as u32)?;
        // SAFETY: so many bytes are there, and any are numbers.
        let map = unsafe { memory.cast::<TensorMap>().read_unaligned() };
        if map.magic == MAGIC && address.is_multiple_of(64) {
            return Ok(map);
        }
        Err(format!("lane {lane}: at {address:#x} lies no tensor's map, or it lies at no multiple of 64"))
    }
}

/// Where the byte of a linear address lies with a swizzle of 128 bytes: pieces of 16 bytes change places within a row.
pub(crate) fn swizzled(address: u64) -> u64 {
    address ^ (address >> 7 & 7) << 4
}
