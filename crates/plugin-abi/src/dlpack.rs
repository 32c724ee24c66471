//! The structs and constants of DLPack 1 (dlpack.h, Apache-2.0), under their own names.
//!
//! [`DLManagedTensorVersioned`] is a tensor with the function that frees it. Nothing here reads or frees memory; for
//! safe access see [`tensor`](crate::tensor).

use std::ffi::c_void;

/// The DLPack version that these structs follow.
pub const VERSION: DLPackVersion = DLPackVersion { major: 1, minor: 0 };

/// `kDLCPU`: host memory.
pub const DEVICE_CPU: i32 = 1;
/// `kDLCUDA`: memory of a CUDA device.
pub const DEVICE_CUDA: i32 = 2;

/// `kDLInt`: signed integer.
pub const CODE_INT: u8 = 0;
/// `kDLUInt`: unsigned integer.
pub const CODE_UINT: u8 = 1;
/// `kDLFloat`: IEEE floating point; f16 with 16 bits.
pub const CODE_FLOAT: u8 = 2;
/// `kDLBfloat`: bfloat16, with 16 bits.
pub const CODE_BFLOAT: u8 = 4;

/// `DLPACK_FLAG_BITMASK_READ_ONLY`: the receiver must not write to the tensor.
pub const FLAG_READ_ONLY: u64 = 1;

/// Version of a tensor's layout. If the major version is unknown, nothing but the deleter of a
/// [`DLManagedTensorVersioned`] may be used.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DLPackVersion {
    /// Changes with the layout.
    pub major: u32,
    /// Changes when constants are added.
    pub minor: u32,
}

/// A device.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DLDevice {
    /// [`DEVICE_CPU`] or [`DEVICE_CUDA`].
    pub device_type: i32,
    /// Index of the device; 0 on the CPU.
    pub device_id: i32,
}

/// Type of a tensor's elements.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DLDataType {
    /// [`CODE_FLOAT`] and so on.
    pub code: u8,
    /// Bits of one value.
    pub bits: u8,
    /// Values in one element; 1 unless vectorised.
    pub lanes: u16,
}

/// A tensor. Its pointers belong to the [`DLManagedTensorVersioned`] that contains it.
#[repr(C)]
#[derive(Debug)]
pub struct DLTensor {
    /// First byte of the allocation; may be null if the tensor is empty.
    pub data: *mut c_void,
    /// Device of `data`.
    pub device: DLDevice,
    /// Length of `shape` and `strides`.
    pub ndim: i32,
    /// Type of the elements.
    pub dtype: DLDataType,
    /// Size of each dimension, outermost first.
    pub shape: *mut i64,
    /// In elements, not bytes; null for row-major.
    pub strides: *mut i64,
    /// Bytes from `data` to the first element.
    pub byte_offset: u64,
}

/// A tensor with the function that frees it.
#[repr(C)]
#[derive(Debug)]
pub struct DLManagedTensorVersioned {
    /// Version of this struct's layout.
    pub version: DLPackVersion,
    /// Private to the creator of the tensor.
    pub manager_ctx: *mut c_void,
    /// Frees the tensor and this struct. The receiver calls it once, from any thread; null if there is nothing to free.
    pub deleter: Option<unsafe extern "C" fn(*mut DLManagedTensorVersioned)>,
    /// Bits such as [`FLAG_READ_ONLY`].
    pub flags: u64,
    /// The tensor itself.
    pub dl_tensor: DLTensor,
}

#[cfg(all(test, target_pointer_width = "64"))]
mod tests {
    use super::*;
    use std::mem::{offset_of, size_of};

    /// Compares the offsets of a struct's fields and its size.
    macro_rules! assert_layout {
        ($name:ident { $($field:ident: $offset:literal),* }, $size:literal) => {
            $(assert_eq!(offset_of!($name, $field), $offset, "{}.{}", stringify!($name), stringify!($field));)*
            assert_eq!(size_of::<$name>(), $size, stringify!($name));
        };
    }

    /// The numbers are those of a C compiler, for dlpack.h 1.1 on 64-bit Linux.
    #[test]
    fn layouts_equal_those_of_dlpack_h() {
        assert_layout!(DLPackVersion { major: 0, minor: 4 }, 8);
        assert_layout!(DLDevice { device_type: 0, device_id: 4 }, 8);
        assert_layout!(DLDataType { code: 0, bits: 1, lanes: 2 }, 4);
        assert_layout!(
            DLTensor { data: 0, device: 8, ndim: 16, dtype: 20, shape: 24, strides: 32, byte_offset: 40 },
            48
        );
        assert_layout!(
            DLManagedTensorVersioned { version: 0, manager_ctx: 8, deleter: 16, flags: 24, dl_tensor: 32 },
            80
        );
        assert_eq!(VERSION.major, 1);
    }
}
