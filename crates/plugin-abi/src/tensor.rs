//! Safe access to DLPack tensors on the CPU, for the host and for plugins: [`OwnedTensor`] and [`BorrowedTensor`].

use crate::dlpack::{
    CODE_BFLOAT, CODE_FLOAT, CODE_INT, CODE_UINT, DEVICE_CPU, DLDataType, DLDevice, DLManagedTensorVersioned, DLTensor,
    VERSION,
};
use std::any::Any;
use std::marker::PhantomData;
use std::ptr::NonNull;

/// Types of elements that the plugin interface supports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ElementType {
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// IEEE single precision.
    F32,
    /// IEEE double precision.
    F64,
    /// Unsigned 8-bit integer.
    U8,
    /// Unsigned 32-bit integer.
    U32,
    /// Signed 64-bit integer.
    I64,
}

/// Each type with its name, and its code and bits in DLPack; in the order of the enum.
const ELEMENTS: [(ElementType, &str, u8, u8); 7] = [
    (ElementType::F16, "f16", CODE_FLOAT, 16),
    (ElementType::Bf16, "bf16", CODE_BFLOAT, 16),
    (ElementType::F32, "f32", CODE_FLOAT, 32),
    (ElementType::F64, "f64", CODE_FLOAT, 64),
    (ElementType::U8, "u8", CODE_UINT, 8),
    (ElementType::U32, "u32", CODE_UINT, 32),
    (ElementType::I64, "i64", CODE_INT, 64),
];

impl ElementType {
    /// The type that DLPack describes as `dtype`, if it is supported.
    pub fn from_dlpack(dtype: DLDataType) -> Option<Self> {
        let found = ELEMENTS.iter().find(|(.., code, bits)| (*code, *bits, 1) == (dtype.code, dtype.bits, dtype.lanes));
        found.map(|(element, ..)| *element)
    }

    /// The type in DLPack's terms.
    pub fn to_dlpack(self) -> DLDataType {
        let (.., code, bits) = ELEMENTS[self as usize];
        DLDataType { code, bits, lanes: 1 }
    }

    /// Bytes of one element.
    pub fn size(self) -> usize {
        ELEMENTS[self as usize].3 as usize / 8
    }

    /// Name of the type, the same as candle's.
    pub fn name(self) -> &'static str {
        ELEMENTS[self as usize].1
    }

    /// The type called `name`, if it is supported.
    pub fn from_name(name: &str) -> Option<Self> {
        ELEMENTS.iter().find(|(_, known, ..)| *known == name).map(|(element, ..)| *element)
    }
}

/// A tensor that this value owns: dropping it calls the deleter.
#[derive(Debug)]
pub struct OwnedTensor(BorrowedTensor<'static>);

/// A checked tensor that is owned elsewhere.
#[derive(Debug, Clone, Copy)]
pub struct BorrowedTensor<'a> {
    tensor: NonNull<DLManagedTensorVersioned>,
    element: ElementType,
    bytes: usize,
    lifetime: PhantomData<&'a DLManagedTensorVersioned>,
}

impl OwnedTensor {
    /// A row-major tensor whose values are the bytes of `owner`, which is dropped with the tensor.
    ///
    /// # Panics
    /// If the length of `owner` does not match `shape`.
    pub fn new<O: AsRef<[u8]> + Send + 'static>(owner: O, element: ElementType, shape: &[usize]) -> Self {
        let owner = Box::new(owner);
        let values: &[u8] = (*owner).as_ref();
        let bytes = values.len();
        assert!(bytes == shape.iter().product::<usize>() * element.size(), "{bytes} bytes for {shape:?}");
        let managed = managed_tensor(values, element, shape.len());
        let shape = shape.iter().map(|size| *size as i64).collect();
        let allocation = Box::into_raw(Box::new(TensorAllocation { managed, shape, _owner: owner }));
        // SAFETY: the allocation was just made, and does not move until the deleter drops it.
        let tensor = unsafe {
            (*allocation).managed.dl_tensor.shape = (*allocation).shape.as_mut_ptr();
            (*allocation).managed.manager_ctx = allocation.cast();
            NonNull::new_unchecked(&raw mut (*allocation).managed)
        };
        Self(BorrowedTensor { tensor, element, bytes, lifetime: PhantomData })
    }

    /// Takes ownership of `tensor`.
    ///
    /// # Safety
    /// `tensor` is null, or a managed tensor that nothing else frees and that describes its memory correctly.
    ///
    /// # Errors
    /// What is wrong with the tensor, which is then freed: a null pointer, another DLPack version or device, an
    /// unsupported dtype, or values that are not row-major.
    pub unsafe fn from_raw(tensor: *mut DLManagedTensorVersioned) -> Result<Self, String> {
        // SAFETY: guaranteed by the caller.
        match unsafe { BorrowedTensor::from_raw(tensor) } {
            Ok(borrowed) => Ok(Self(borrowed)),
            Err(reason) => {
                // SAFETY: guaranteed by the caller; it is freed here and nowhere else.
                unsafe { free(tensor) };
                Err(reason)
            }
        }
    }

    /// Borrows the tensor.
    pub fn view(&self) -> BorrowedTensor<'_> {
        self.0
    }

    /// Pointer to the tensor, valid as long as `self` is.
    pub fn as_ptr(&self) -> *const DLManagedTensorVersioned {
        self.0.tensor.as_ptr()
    }

    /// Releases ownership: the receiver of the pointer must call the deleter.
    pub fn into_raw(self) -> *mut DLManagedTensorVersioned {
        let tensor = self.0.tensor.as_ptr();
        std::mem::forget(self);
        tensor
    }
}

impl Drop for OwnedTensor {
    fn drop(&mut self) {
        // SAFETY: this value owns the tensor; only `into_raw` releases it, and forgets the value.
        unsafe { free(self.0.tensor.as_ptr()) }
    }
}

// SAFETY: DLPack allows the deleter to be called from any thread, and nothing writes through a tensor here.
unsafe impl Send for OwnedTensor {}
// SAFETY: as above.
unsafe impl Sync for OwnedTensor {}

impl<'a> BorrowedTensor<'a> {
    /// Checks and borrows `tensor`.
    ///
    /// # Safety
    /// `tensor` is null, or a managed tensor that stays valid for `'a` and describes its memory correctly.
    ///
    /// # Errors
    /// As for [`OwnedTensor::from_raw`]; nothing is freed.
    pub unsafe fn from_raw(tensor: *const DLManagedTensorVersioned) -> Result<Self, String> {
        let pointer = NonNull::new(tensor.cast_mut()).ok_or("the pointer is null")?;
        // SAFETY: it is not null, and valid by the caller's guarantee. Nothing but the version is read before that is
        // known.
        let version = unsafe { (*tensor).version };
        if version.major != VERSION.major {
            return Err(format!("DLPack version {}, expected {}", version.major, VERSION.major));
        }
        // SAFETY: as above, and the layout is that of this version.
        let tensor = unsafe { &(*tensor).dl_tensor };
        let element = ElementType::from_dlpack(tensor.dtype);
        let element = element.ok_or_else(|| format!("dtype {:?} is not supported", tensor.dtype))?;
        // SAFETY: the caller guarantees shape and strides.
        let elements = unsafe { element_count(tensor) }?;
        let bytes = elements.checked_mul(element.size()).ok_or("the tensor is larger than the address space")?;
        if tensor.device.device_type != DEVICE_CPU {
            return Err(format!("the tensor is on {:?}, expected the CPU", tensor.device));
        }
        if tensor.data.is_null() && bytes > 0 {
            return Err("the data pointer is null".to_owned());
        }
        Ok(Self { tensor: pointer, element, bytes, lifetime: PhantomData })
    }

    /// Type of the elements.
    pub fn element(&self) -> ElementType {
        self.element
    }

    /// Size of each dimension, outermost first.
    pub fn shape(&self) -> Vec<usize> {
        // SAFETY: the struct is checked: the shape has ndim sizes, none of them negative.
        unsafe {
            let tensor = &self.tensor.as_ref().dl_tensor;
            (0..tensor.ndim as usize).map(|axis| *tensor.shape.add(axis) as usize).collect()
        }
    }

    /// The values, row-major.
    pub fn bytes(&self) -> &'a [u8] {
        if self.bytes == 0 {
            return &[];
        }
        // SAFETY: the struct is checked, and its creator guarantees the memory.
        unsafe {
            let tensor = &self.tensor.as_ref().dl_tensor;
            let first = tensor.data.cast::<u8>().add(tensor.byte_offset as usize);
            std::slice::from_raw_parts(first, self.bytes)
        }
    }
}

/// Number of elements; an error if they are not row-major.
///
/// # Safety
/// Shape and strides have ndim values; strides may be null.
unsafe fn element_count(tensor: &DLTensor) -> Result<usize, String> {
    let axes = usize::try_from(tensor.ndim).map_err(|_| format!("the tensor has {} dimensions", tensor.ndim))?;
    if axes > 0 && tensor.shape.is_null() {
        return Err("the shape pointer is null".to_owned());
    }
    let mut elements = 1usize;
    for axis in (0..axes).rev() {
        // SAFETY: guaranteed by the caller.
        let size = unsafe { *tensor.shape.add(axis) };
        // SAFETY: guaranteed by the caller.
        let stride = (!tensor.strides.is_null()).then(|| unsafe { *tensor.strides.add(axis) });
        let size = usize::try_from(size).map_err(|_| format!("dimension {axis} has the size {size}"))?;
        // The stride of a dimension of size 1 is never used, so it may have any value.
        if size > 1 && stride.is_some_and(|stride| usize::try_from(stride) != Ok(elements)) {
            return Err("the tensor is not row-major".to_owned());
        }
        elements = elements.checked_mul(size).ok_or("the tensor is larger than the address space")?;
    }
    Ok(elements)
}

/// # Safety
/// `tensor` is null, or a managed tensor that nothing else frees.
unsafe fn free(tensor: *mut DLManagedTensorVersioned) {
    if tensor.is_null() {
        return;
    }
    // SAFETY: guaranteed by the caller; the deleter is at the same offset in every version, and nothing else is read.
    unsafe {
        if let Some(deleter) = (*tensor).deleter {
            deleter(tensor);
        }
    }
}

/// Everything that a tensor made here owns until its deleter is called.
struct TensorAllocation {
    managed: DLManagedTensorVersioned,
    shape: Vec<i64>,
    _owner: Box<dyn Any + Send>,
}

/// The structs of a tensor over `values`, without the pointers into the allocation that will contain them.
fn managed_tensor(values: &[u8], element: ElementType, axes: usize) -> DLManagedTensorVersioned {
    DLManagedTensorVersioned {
        version: VERSION,
        manager_ctx: std::ptr::null_mut(),
        deleter: Some(drop_allocation),
        flags: 0,
        dl_tensor: DLTensor {
            data: values.as_ptr().cast_mut().cast(),
            device: DLDevice { device_type: DEVICE_CPU, device_id: 0 },
            ndim: axes as i32,
            dtype: element.to_dlpack(),
            shape: std::ptr::null_mut(),
            strides: std::ptr::null_mut(),
            byte_offset: 0,
        },
    }
}

unsafe extern "C" fn drop_allocation(tensor: *mut DLManagedTensorVersioned) {
    // SAFETY: only `OwnedTensor::new` uses this deleter, with a box as its context; it is called once.
    unsafe { drop(Box::from_raw((*tensor).manager_ctx.cast::<TensorAllocation>())) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn a_tensor_is_read_back_and_freed_once() {
        let memory: Arc<[u8]> = Arc::from([1.0f32, 2.0, 3.0].map(f32::to_le_bytes).concat());
        let raw = OwnedTensor::new(memory.clone(), ElementType::F32, &[3, 1]).into_raw();
        assert_eq!(Arc::strong_count(&memory), 2);
        // SAFETY: nothing else owns it.
        let owned = unsafe { OwnedTensor::from_raw(raw) }.expect("a valid tensor");
        assert_eq!((owned.view().shape(), owned.view().element()), (vec![3, 1], ElementType::F32));
        assert_eq!(owned.view().bytes(), &*memory);
        drop(owned);
        assert_eq!(Arc::strong_count(&memory), 1);
    }

    #[test]
    fn invalid_tensors_are_rejected_and_freed() {
        type Spoil = fn(&mut DLManagedTensorVersioned);
        let cases: [(Spoil, &str); 6] = [
            (|tensor| tensor.version.major = 2, "DLPack version 2, expected 1"),
            (|tensor| tensor.dl_tensor.device.device_type = 2, "expected the CPU"),
            (|tensor| tensor.dl_tensor.dtype.bits = 4, "bits: 4, lanes: 1 } is not supported"),
            (|tensor| tensor.dl_tensor.data = std::ptr::null_mut(), "the data pointer is null"),
            (|tensor| tensor.dl_tensor.shape = std::ptr::null_mut(), "the shape pointer is null"),
            (|tensor| tensor.dl_tensor.ndim = -1, "the tensor has -1 dimensions"),
        ];
        for (spoil, expected) in cases {
            let memory: Arc<[u8]> = Arc::from([0u8; 8]);
            let raw = OwnedTensor::new(memory.clone(), ElementType::F32, &[2]).into_raw();
            // SAFETY: nothing else owns it.
            let error = unsafe {
                spoil(&mut *raw);
                OwnedTensor::from_raw(raw)
            };
            let error = error.expect_err("an invalid tensor");
            assert!(error.contains(expected), "{error}");
            assert_eq!(Arc::strong_count(&memory), 1, "{expected}");
        }
        // SAFETY: null is allowed.
        let error = unsafe { OwnedTensor::from_raw(std::ptr::null_mut()) }.expect_err("null");
        assert_eq!(error, "the pointer is null");
    }

    #[test]
    fn rows_with_gaps_are_rejected() {
        let mut strides = [3i64, 1];
        let raw = OwnedTensor::new([0u8; 16], ElementType::F32, &[2, 2]).into_raw();
        // SAFETY: nothing else owns it; the strides live until it is freed.
        let error = unsafe {
            (*raw).dl_tensor.strides = strides.as_mut_ptr();
            OwnedTensor::from_raw(raw)
        };
        assert_eq!(error.expect_err("a gap"), "the tensor is not row-major");
    }

    #[test]
    fn the_table_of_elements_has_the_order_of_the_enum() {
        for (index, (element, ..)) in ELEMENTS.iter().enumerate() {
            assert_eq!(*element as usize, index);
            assert_eq!(ElementType::from_dlpack(element.to_dlpack()), Some(*element));
            assert_eq!(ElementType::from_name(element.name()), Some(*element));
        }
    }
}
