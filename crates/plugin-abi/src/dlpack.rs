//! Tensors at the boundary: the structs of DLPack 1 (dlpack.h, Apache-2.0), field for field.
//!
//! The main type is [`DLManagedTensorVersioned`], `DLManagedTensorVersioned` there. Nothing here reads or frees memory: who
//! receives a managed tensor calls its deleter once, from any thread, when done with it.

use std::ffi::c_void;

/// The version of DLPack that these structs follow.
pub const VERSION: DLPackVersion = DLPackVersion { major: 1, minor: 0 };

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

/// `DLPackVersion`. With another major only `deleter` of a [`DLManagedTensorVersioned`] may be used.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DLPackVersion {
    /// Changes when the layout changes.
    pub major: u32,
    /// Changes when constants are added.
    pub minor: u32,
}

/// `DLDevice`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DLDevice {
    /// [`DEVICE_CPU`] or [`DEVICE_CUDA`].
    pub device_type: i32,
    /// Number of the device; 0 on the CPU.
    pub device_id: i32,
}

/// `DLDataType`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DLDataType {
    /// [`CODE_FLOAT`] and so on.
    pub code: u8,
    /// Bits of one number.
    pub bits: u8,
    /// Numbers in one element; 1 unless vectorised.
    pub lanes: u16,
}

/// `DLTensor`. All pointers belong to the [`DLManagedTensorVersioned`] around it.
#[repr(C)]
#[derive(Debug)]
pub struct DLTensor {
    /// First byte of the allocation; null only if the tensor is empty.
    pub data: *mut c_void,
    /// Where `data` lies.
    pub device: DLDevice,
    /// Length of `shape` and `strides`.
    pub ndim: i32,
    /// Number format.
    pub dtype: DLDataType,
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
pub struct DLManagedTensorVersioned {
    /// Of the struct that follows.
    pub version: DLPackVersion,
    /// For the one who made it alone.
    pub manager_ctx: *mut c_void,
    /// Frees the tensor and this struct. Called once by who received it; null if there is nothing to free.
    pub deleter: Option<unsafe extern "C" fn(*mut DLManagedTensorVersioned)>,
    /// Bits such as [`FLAG_READ_ONLY`].
    pub flags: u64,
    /// The tensor.
    pub tensor: DLTensor,
}

#[cfg(test)]
mod tests {
    use super::*;
    use dlpark::ffi;
    use std::mem::{offset_of, size_of};

    /// Sizes of two structs, and offsets of their fields, pairwise.
    macro_rules! same_layout {
        ($ours:ty, $theirs:ty, { $($field:ident: $name:ident),* }) => {
            assert_eq!(size_of::<$ours>(), size_of::<$theirs>(), stringify!($ours));
            $(assert_eq!(offset_of!($ours, $field), offset_of!($theirs, $name), stringify!($field));)*
        };
    }

    /// As the crate dlpark has it, which is generated from dlpack.h.
    #[test]
    fn layout_is_that_of_dlpack() {
        same_layout!(DLPackVersion, ffi::DLPackVersion, { major: major, minor: minor });
        same_layout!(DLDevice, ffi::DLDevice, { device_type: device_type, device_id: device_id });
        same_layout!(DLDataType, ffi::DLDataType, { code: code, bits: bits, lanes: lanes });
        same_layout!(DLTensor, ffi::DLTensor, {
            data: data, device: device, ndim: ndim, dtype: dtype, shape: shape, strides: strides, byte_offset: byte_offset
        });
        same_layout!(DLManagedTensorVersioned, ffi::DLManagedTensorVersioned, {
            version: version, manager_ctx: manager_ctx, deleter: deleter, flags: flags, tensor: dl_tensor
        });
        assert_eq!(VERSION.major, ffi::DLPACK_MAJOR_VERSION);
    }
}
