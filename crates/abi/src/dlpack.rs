//! Tensors at the boundary: the structs of DLPack 1 (dlpack.h, Apache-2.0), field for field.
//!
//! The main type is [`ManagedTensor`], `DLManagedTensorVersioned` there. Nothing here reads or frees memory: who
//! receives a managed tensor calls its deleter once, from any thread, when done with it.

use std::ffi::c_void;

/// The version of DLPack that these structs follow.
pub const VERSION: Version = Version { major: 1, minor: 0 };

/// `kDLCPU`: plain memory of the process.
pub const DEVICE_CPU: i32 = 1;
/// `kDLCUDA`: memory of a CUDA device.
pub const DEVICE_CUDA: i32 = 2;

/// `kDLInt`: signed integers.
pub const CODE_INT: u8 = 0;
/// `kDLUInt`: unsigned integers.
pub const CODE_UINT: u8 = 1;
/// `kDLFloat`: IEEE floating point; 16 bits are f16.
pub const CODE_FLOAT: u8 = 2;
/// `kDLBfloat`: with 16 bits, bfloat16.
pub const CODE_BFLOAT: u8 = 4;

/// `DLPACK_FLAG_BITMASK_READ_ONLY`: the receiver must not write.
pub const FLAG_READ_ONLY: u64 = 1;

/// `DLPackVersion`. With another major only `deleter` of a [`ManagedTensor`] may be used.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Version {
    /// Changes when the layout changes.
    pub major: u32,
    /// Changes when constants are added.
    pub minor: u32,
}

/// `DLDevice`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Device {
    /// [`DEVICE_CPU`] or [`DEVICE_CUDA`].
    pub device_type: i32,
    /// Number of the device; 0 on the CPU.
    pub device_id: i32,
}

/// `DLDataType`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DataType {
    /// [`CODE_FLOAT`] and so on.
    pub code: u8,
    /// Bits of one number.
    pub bits: u8,
    /// Numbers in one element; 1 unless vectorised.
    pub lanes: u16,
}

/// `DLTensor`. All pointers belong to the [`ManagedTensor`] around it.
#[repr(C)]
#[derive(Debug)]
pub struct Tensor {
    /// First byte of the allocation; null only if the tensor is empty.
    pub data: *mut c_void,
    /// Where `data` lies.
    pub device: Device,
    /// Length of `shape` and `strides`.
    pub ndim: i32,
    /// Number format.
    pub dtype: DataType,
    /// Extents, outermost first.
    pub shape: *mut i64,
    /// Elements, not bytes, from one index to the next; null for row-major.
    pub strides: *mut i64,
    /// Bytes from `data` to the first element.
    pub byte_offset: u64,
}

/// `DLManagedTensorVersioned`: a tensor with the way to give it back.
#[repr(C)]
#[derive(Debug)]
pub struct ManagedTensor {
    /// Of the struct that follows.
    pub version: Version,
    /// For the one who made it alone.
    pub manager_ctx: *mut c_void,
    /// Frees the tensor and this struct. Called once by who received it; null if there is nothing to free.
    pub deleter: Option<unsafe extern "C" fn(*mut ManagedTensor)>,
    /// Bits such as [`FLAG_READ_ONLY`].
    pub flags: u64,
    /// The tensor.
    pub tensor: Tensor,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::{offset_of, size_of};

    /// Sizes and offsets that a C compiler gives for dlpack.h 1.0 on 64-bit machines.
    #[test]
    #[cfg(target_pointer_width = "64")]
    fn layout_is_that_of_dlpack() {
        assert_eq!((size_of::<DataType>(), size_of::<Device>(), size_of::<Version>()), (4, 8, 8));
        assert_eq!((size_of::<Tensor>(), size_of::<ManagedTensor>()), (48, 80));
        let tensor = [
            offset_of!(Tensor, device),
            offset_of!(Tensor, ndim),
            offset_of!(Tensor, dtype),
            offset_of!(Tensor, shape),
            offset_of!(Tensor, strides),
            offset_of!(Tensor, byte_offset),
        ];
        assert_eq!(tensor, [8, 16, 20, 24, 32, 40]);
        let managed = [
            offset_of!(ManagedTensor, manager_ctx),
            offset_of!(ManagedTensor, deleter),
            offset_of!(ManagedTensor, flags),
            offset_of!(ManagedTensor, tensor),
        ];
        assert_eq!(managed, [8, 16, 24, 32]);
    }
}
