//! [`TensorMap`]: a tensor in global memory and the box that bulk copies take from it, as `cuTensorMapEncodeTiled` encodes
//! them; and [`BulkCopy`], such a copy to shared memory.

use crate::memory::{Allocations, find};
use std::array::from_fn;
use std::ffi::c_int;
use std::ops::Range;
use std::ptr::copy_nonoverlapping;

/// Bytes of an element. Only 16-bit types are simulated.
const ELEMENT: u64 = 2;
/// The most bytes of a row of a box.
const MAX_ROW: usize = 256 * ELEMENT as usize;
/// Marks memory that holds an encoded map.
const MAGIC: u64 = 0x70a6_6e15_0f7e_5005;

/// An encoded map. Missing dimensions have one element.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct TensorMap {
    magic: u64,
    address: u64,
    sizes: [u64; 5],
    /// Bytes from one element to the next.
    strides: [u64; 5],
    box_sizes: [u16; 5],
    rank: u8,
    /// 1 for the 128-byte swizzle, 0 for none.
    swizzled: u8,
    unused: [u8; 20],
}

/// The arguments of `cuTensorMapEncodeTiled`.
pub struct EncodeRequest<'a> {
    /// `CUtensorMapDataType`
    pub data_type: c_int,
    /// Address of the tensor.
    pub address: u64,
    /// Elements along each dimension, innermost first.
    pub sizes: &'a [u64],
    /// Strides in bytes, from the second dimension on.
    pub strides: &'a [u64],
    /// Elements of the box along each dimension.
    pub box_sizes: &'a [u32],
    /// Strides of the elements that a box takes.
    pub element_strides: &'a [u32],
    /// `CUtensorMapInterleave`
    pub interleave: c_int,
    /// `CUtensorMapSwizzle`
    pub swizzle: c_int,
    /// `CUtensorMapL2promotion`
    pub promotion: c_int,
    /// `CUtensorMapFloatOOBfill`
    pub fill: c_int,
}

impl EncodeRequest<'_> {
    /// The first argument that the driver would refuse or that is not simulated.
    pub fn problem(&self) -> Option<&'static str> {
        self.mode_problem().or_else(|| self.shape_problem())
    }

    fn mode_problem(&self) -> Option<&'static str> {
        let requirements = [
            (matches!(self.data_type, 1 | 6 | 9), "only 16-bit element types are simulated"),
            (self.interleave == 0, "interleaved tensors are not simulated"),
            (matches!(self.swizzle, 0 | 3), "only the 128-byte swizzle is simulated"),
            (matches!(self.promotion, 0..=3), "the L2 promotion is not one of 0 to 3"),
            (self.fill == 0, "only zero fill is simulated"),
            (self.element_strides.iter().all(|stride| *stride == 1), "element strides other than 1 are not simulated"),
        ];
        requirements.into_iter().find_map(|(holds, text)| (!holds).then_some(text))
    }

    fn shape_problem(&self) -> Option<&'static str> {
        let row = u64::from(self.box_sizes[0]) * ELEMENT;
        let stride_is_valid = |stride: &u64| stride.is_multiple_of(16) && *stride < 1 << 40;
        let requirements = [
            (self.address.is_multiple_of(16), "the address is not a multiple of 16"),
            (self.sizes.iter().all(|size| (1..=1 << 32).contains(size)), "a dimension is not in 1 to 2^32"),
            (self.strides.iter().all(stride_is_valid), "a stride is not a multiple of 16 below 2^40"),
            (self.box_sizes.iter().all(|size| (1..=256).contains(size)), "a dimension of the box is not in 1 to 256"),
            (row.is_multiple_of(16), "a row of the box is not a multiple of 16 bytes"),
            (self.swizzle == 0 || row <= 128, "a row of the box is longer than the swizzle"),
            (self.swizzle == 0 || row >= 128, "rows shorter than the swizzle are not simulated"),
        ];
        requirements.into_iter().find_map(|(holds, text)| (!holds).then_some(text))
    }
}

impl TensorMap {
    /// Encodes a request that has no problem.
    pub fn new(request: &EncodeRequest) -> Self {
        let stride = |axis: usize| match axis {
            0 => ELEMENT,
            _ => request.strides.get(axis - 1).copied().unwrap_or(0),
        };
        Self {
            magic: MAGIC,
            address: request.address,
            sizes: from_fn(|axis| request.sizes.get(axis).copied().unwrap_or(1)),
            strides: from_fn(stride),
            box_sizes: from_fn(|axis| request.box_sizes.get(axis).map_or(1, |size| *size as u16)),
            rank: request.sizes.len() as u8,
            swizzled: u8::from(request.swizzle != 0),
            unused: [0; 20],
        }
    }

    /// Whether this memory was written by `cuTensorMapEncodeTiled`.
    pub fn is_encoded(&self) -> bool {
        self.magic == MAGIC
    }

    /// Number of dimensions.
    pub fn rank(&self) -> usize {
        usize::from(self.rank)
    }

    fn row_bytes(&self) -> usize {
        usize::from(self.box_sizes[0]) * ELEMENT as usize
    }

    fn rows(&self) -> usize {
        self.box_sizes[1..].iter().map(|size| usize::from(*size)).product()
    }
}

/// A copy of a box to shared memory.
pub struct BulkCopy {
    /// The tensor.
    pub map: TensorMap,
    /// Coordinates of the box's first element.
    pub from: [i64; 5],
    /// Offset in shared memory.
    pub to: u64,
    /// Offset of the mbarrier at which it completes.
    pub barrier: u64,
    /// The instruction's text, for error messages.
    pub text: String,
}

impl BulkCopy {
    /// Size of the box, including elements outside of the tensor.
    pub fn bytes(&self) -> usize {
        self.map.row_bytes() * self.map.rows()
    }

    /// The bytes of shared memory that it writes.
    pub fn destination(&self) -> Range<u64> {
        self.to..self.to + self.bytes() as u64
    }

    /// Alignment of the destination: a swizzle permutes groups of eight 128-byte rows.
    pub fn alignment(&self) -> u64 {
        if self.map.swizzled == 0 { 128 } else { 1024 }
    }

    /// Copies row by row. Elements outside of the tensor become zeros.
    ///
    /// # Errors
    /// The tensor is not allocated.
    pub fn land(&self, shared: &mut [u8], allocations: &Allocations) -> Result<(), String> {
        let row_bytes = self.map.row_bytes();
        for number in 0..self.map.rows() {
            let row = self.row(number, allocations)?;
            for (at, chunk) in row[..row_bytes].chunks_exact(16).enumerate() {
                let linear = self.to + (number * row_bytes + at * 16) as u64;
                let offset = if self.map.swizzled == 0 { linear } else { swizzle_128(linear) };
                shared[offset as usize..][..16].copy_from_slice(chunk);
            }
        }
        Ok(())
    }

    fn row(&self, number: usize, allocations: &Allocations) -> Result<[u8; MAX_ROW], String> {
        let mut row = [0; MAX_ROW];
        let Some(begin) = self.row_address(number) else { return Ok(row) };
        let first = self.from[0];
        let size = self.map.sizes[0] as i64;
        let inside = first.clamp(0, size)..(first + i64::from(self.map.box_sizes[0])).clamp(0, size);
        let bytes = (inside.end - inside.start) as u64 * ELEMENT;
        if bytes > 0 {
            let address = (begin + i128::from(inside.start) * i128::from(ELEMENT)) as u64;
            find(allocations, address, bytes).ok_or_else(|| format!("{address:#x} is not allocated"))?;
            let to = &mut row[((inside.start - first) as u64 * ELEMENT) as usize..];
            // SAFETY: these bytes are allocated, and a row has space for those of a box.
            unsafe { copy_nonoverlapping(address as *const u8, to.as_mut_ptr(), bytes as usize) };
        }
        Ok(row)
    }

    /// Address of the tensor's row that holds this row of the box; none if it is outside of the tensor.
    fn row_address(&self, number: usize) -> Option<i128> {
        let mut rest = number as u64;
        let mut address = i128::from(self.map.address);
        for axis in 1..5 {
            let box_size = u64::from(self.map.box_sizes[axis]);
            let at = self.from[axis] + (rest % box_size) as i64;
            if !(0..self.map.sizes[axis] as i64).contains(&at) {
                return None;
            }
            rest /= box_size;
            address += i128::from(at) * i128::from(self.map.strides[axis]);
        }
        Some(address)
    }
}

/// Applies the 128-byte swizzle to an address: 16-byte chunks trade places within their 128-byte row.
pub fn swizzle_128(address: u64) -> u64 {
    address ^ (address >> 7 & 7) << 4
}
