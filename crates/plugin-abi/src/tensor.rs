//! [`OwnedTensor`] and [`BorrowedTensor`]: DLPack tensors on the CPU with safe access, for both sides of the boundary;
//! and [`give`], which makes one. They compute nothing.

use crate::dlpack::{
    CODE_BFLOAT, CODE_FLOAT, CODE_INT, CODE_UINT, DEVICE_CPU, DLDataType, DLDevice, DLManagedTensorVersioned, DLTensor,
    VERSION,
};
use std::any::Any;
use std::ffi::c_void;
use std::marker::PhantomData;
use std::ptr::NonNull;

/// Number formats that cross.
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
    /// Bytes.
    U8,
    /// Unsigned 32-bit integers.
    U32,
    /// Signed 64-bit integers.
    I64,
}

/// Each with its name, and with code and bits in DLPack; in the order of the enum.
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
    /// The format that DLPack describes so, if it is one of these.
    pub fn of(dtype: DLDataType) -> Option<Self> {
        let found = ELEMENTS.iter().find(|(.., code, bits)| (*code, *bits, 1) == (dtype.code, dtype.bits, dtype.lanes));
        found.map(|(element, ..)| *element)
    }

    /// How DLPack describes it.
    pub fn dtype(self) -> DLDataType {
        let (.., code, bits) = ELEMENTS[self as usize];
        DLDataType { code, bits, lanes: 1 }
    }

    /// Bytes of one number.
    pub fn size(self) -> usize {
        ELEMENTS[self as usize].3 as usize / 8
    }

    /// Its name, as candle has it.
    pub fn name(self) -> &'static str {
        ELEMENTS[self as usize].1
    }

    /// The format of that name, if it is one of these.
    pub fn named(name: &str) -> Option<Self> {
        ELEMENTS.iter().find(|(_, own, ..)| *own == name).map(|(element, ..)| *element)
    }
}

/// A tensor that belongs to whoever holds this; dropping it calls the deleter.
#[derive(Debug)]
pub struct OwnedTensor(BorrowedTensor<'static>);

/// A tensor that another owns.
#[derive(Debug, Clone, Copy)]
pub struct BorrowedTensor<'a> {
    tensor: NonNull<DLManagedTensorVersioned>,
    element: ElementType,
    bytes: usize,
    life: PhantomData<&'a DLManagedTensorVersioned>,
}

impl OwnedTensor {
    /// Takes over `tensor`.
    ///
    /// # Safety
    /// Null, or a managed tensor that nobody else frees, whose memory is as it says.
    ///
    /// # Errors
    /// What is wrong with it, which is freed then: null, another version or device, a format that does not cross, or
    /// values that are not row-major.
    pub unsafe fn take(tensor: *mut DLManagedTensorVersioned) -> Result<Self, String> {
        // SAFETY: the caller says so.
        match unsafe { BorrowedTensor::new(tensor) } {
            Ok(borrowed) => Ok(Self(borrowed)),
            Err(reason) => {
                // SAFETY: as above; it is freed here and nowhere else.
                unsafe { free(tensor) };
                Err(reason)
            }
        }
    }

    /// What it holds.
    pub fn view(&self) -> BorrowedTensor<'_> {
        self.0
    }

    /// Lends it as a table has it.
    pub fn as_ptr(&self) -> *const DLManagedTensorVersioned {
        self.0.tensor.as_ptr()
    }

    /// Gives it away with the duty to call the deleter.
    pub fn into_raw(self) -> *mut DLManagedTensorVersioned {
        let tensor = self.0.tensor.as_ptr();
        std::mem::forget(self);
        tensor
    }
}

impl Drop for OwnedTensor {
    fn drop(&mut self) {
        // SAFETY: it was taken over by `take`, and is given away by `into_raw` alone, which forgets it.
        unsafe { free(self.0.tensor.as_ptr()) }
    }
}

// SAFETY: DLPack lets the deleter be called from any thread, and nothing writes through a tensor here.
unsafe impl Send for OwnedTensor {}
// SAFETY: as above.
unsafe impl Sync for OwnedTensor {}

impl<'a> BorrowedTensor<'a> {
    /// Looks at `tensor`.
    ///
    /// # Safety
    /// Null, or a managed tensor that stands for `'a`, whose memory is as it says.
    ///
    /// # Errors
    /// As [`OwnedTensor::take`]; nothing is freed.
    pub unsafe fn new(tensor: *const DLManagedTensorVersioned) -> Result<Self, String> {
        let found = NonNull::new(tensor.cast_mut()).ok_or("a tensor is null")?;
        // SAFETY: it is not null, and the caller says that it stands. Only the version is read before it is known.
        let version = unsafe { (*tensor).version };
        if version.major != VERSION.major {
            return Err(format!("a tensor of DLPack {}, expected {}", version.major, VERSION.major));
        }
        // SAFETY: as above, and the version is ours.
        let tensor = unsafe { &(*tensor).tensor };
        let element =
            ElementType::of(tensor.dtype).ok_or_else(|| format!("number format {:?} cannot cross", tensor.dtype))?;
        // SAFETY: the caller says that shape and strides are as the tensor says.
        let bytes = unsafe { extent(tensor) }?.checked_mul(element.size()).ok_or("a tensor is larger than memory")?;
        if tensor.device.device_type != DEVICE_CPU {
            return Err(format!("a tensor on device {:?}, expected the CPU", tensor.device));
        }
        if tensor.data.is_null() && bytes > 0 {
            return Err("a tensor without data".to_owned());
        }
        Ok(Self { tensor: found, element, bytes, life: PhantomData })
    }

    /// Number format.
    pub fn element(&self) -> ElementType {
        self.element
    }

    /// Extents, outermost first.
    pub fn shape(&self) -> Vec<usize> {
        // SAFETY: `new` checked the struct, whose shape has ndim extents, none negative.
        unsafe {
            let tensor = &self.tensor.as_ref().tensor;
            (0..tensor.ndim as usize).map(|axis| *tensor.shape.add(axis) as usize).collect()
        }
    }

    /// Values, row-major.
    pub fn bytes(&self) -> &'a [u8] {
        if self.bytes == 0 {
            return &[];
        }
        // SAFETY: `new` checked the struct, and its maker says that the memory is there.
        unsafe {
            let tensor = &self.tensor.as_ref().tensor;
            let first = tensor.data.cast::<u8>().add(tensor.byte_offset as usize);
            std::slice::from_raw_parts(first, self.bytes)
        }
    }
}

/// How many elements there are, if they are row-major.
///
/// # Safety
/// Shape and strides have ndim numbers, or strides are null.
unsafe fn extent(tensor: &DLTensor) -> Result<usize, String> {
    let axes = usize::try_from(tensor.ndim).map_err(|_| "a tensor with fewer than no axes")?;
    if axes > 0 && tensor.shape.is_null() {
        return Err("a tensor without a shape".to_owned());
    }
    let mut elements = 1usize;
    for axis in (0..axes).rev() {
        // SAFETY: the caller says so.
        let (extent, stride) = unsafe {
            (*tensor.shape.add(axis), if tensor.strides.is_null() { None } else { Some(*tensor.strides.add(axis)) })
        };
        let extent = usize::try_from(extent).map_err(|_| "a tensor with a negative extent")?;
        if extent > 1 && stride.is_some_and(|stride| usize::try_from(stride) != Ok(elements)) {
            return Err("a tensor that is not row-major".to_owned());
        }
        elements = elements.checked_mul(extent).ok_or("a tensor is larger than memory")?;
    }
    Ok(elements)
}

/// # Safety
/// Null, or a managed tensor that is freed here alone.
unsafe fn free(tensor: *mut DLManagedTensorVersioned) {
    if tensor.is_null() {
        return;
    }
    // SAFETY: the caller says so; deleter stands at the same place in every version, and no more is looked at.
    unsafe {
        if let Some(deleter) = (*tensor).deleter {
            deleter(tensor);
        }
    }
}

/// What a given tensor keeps until its deleter is called.
struct Keeper {
    managed: DLManagedTensorVersioned,
    shape: Vec<i64>,
    _owner: Box<dyn Any + Send>,
}

/// Makes a managed tensor over memory that `owner` keeps, row-major. Whoever receives it calls its deleter.
///
/// # Panics
/// If `owner` keeps fewer bytes than `shape` asks for.
pub fn give<O: AsRef<[u8]> + Send + 'static>(
    owner: O,
    element: ElementType,
    shape: &[usize],
) -> *mut DLManagedTensorVersioned {
    let owner = Box::new(owner);
    let bytes: &[u8] = (*owner).as_ref();
    assert!(bytes.len() == shape.iter().product::<usize>() * element.size(), "{} bytes for {shape:?}", bytes.len());
    let data = bytes.as_ptr().cast_mut().cast::<c_void>();
    let tensor = DLTensor {
        data,
        device: DLDevice { device_type: DEVICE_CPU, device_id: 0 },
        ndim: shape.len() as i32,
        dtype: element.dtype(),
        shape: std::ptr::null_mut(),
        strides: std::ptr::null_mut(),
        byte_offset: 0,
    };
    let managed = DLManagedTensorVersioned {
        version: VERSION,
        manager_ctx: std::ptr::null_mut(),
        deleter: Some(drop_keeper),
        flags: 0,
        tensor,
    };
    let shape = shape.iter().map(|extent| *extent as i64).collect();
    let keeper = Box::into_raw(Box::new(Keeper { managed, shape, _owner: owner }));
    // SAFETY: the keeper was made just now. Both pointers lead into it, and it does not move until it is dropped.
    unsafe {
        (*keeper).managed.tensor.shape = (*keeper).shape.as_mut_ptr();
        (*keeper).managed.manager_ctx = keeper.cast();
        &raw mut (*keeper).managed
    }
}

unsafe extern "C" fn drop_keeper(tensor: *mut DLManagedTensorVersioned) {
    // SAFETY: `give` alone uses this deleter, and wrote there what it had boxed; it is called once.
    unsafe { drop(Box::from_raw((*tensor).manager_ctx.cast::<Keeper>())) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn what_is_given_comes_back_and_is_freed_once() {
        let memory: Arc<[u8]> = Arc::from([1.0f32, 2.0, 3.0].map(f32::to_le_bytes).concat());
        let given = give(memory.clone(), ElementType::F32, &[3, 1]);
        assert_eq!(Arc::strong_count(&memory), 2);
        // SAFETY: it was given just now, to us.
        let owned = unsafe { OwnedTensor::take(given) }.expect("a good tensor");
        assert_eq!((owned.view().shape(), owned.view().element()), (vec![3, 1], ElementType::F32));
        assert_eq!(owned.view().bytes(), &*memory);
        drop(owned);
        assert_eq!(Arc::strong_count(&memory), 1);
    }

    #[test]
    fn what_is_not_as_it_should_be_is_refused_and_freed() {
        type Spoil = fn(&mut DLManagedTensorVersioned);
        let cases: [(Spoil, &str); 5] = [
            (|tensor| tensor.version.major = 2, "DLPack 2"),
            (|tensor| tensor.tensor.device.device_type = 2, "expected the CPU"),
            (|tensor| tensor.tensor.dtype.bits = 4, "cannot cross"),
            (|tensor| tensor.tensor.data = std::ptr::null_mut(), "without data"),
            (|tensor| tensor.tensor.ndim = -1, "fewer than no axes"),
        ];
        for (spoil, expected) in cases {
            let memory: Arc<[u8]> = Arc::from([0u8; 8]);
            let given = give(memory.clone(), ElementType::F32, &[2]);
            // SAFETY: it was given just now, to us.
            let error = unsafe {
                spoil(&mut *given);
                OwnedTensor::take(given)
            };
            assert!(error.expect_err("a bad tensor").contains(expected), "{expected}");
            assert_eq!(Arc::strong_count(&memory), 1, "{expected}");
        }
        // SAFETY: null is allowed.
        assert!(unsafe { OwnedTensor::take(std::ptr::null_mut()) }.is_err());
    }

    #[test]
    fn rows_with_gaps_are_refused() {
        let mut strides = [3i64, 1];
        let given = give([0u8; 16], ElementType::F32, &[2, 2]);
        // SAFETY: it was given just now; the strides stand until it is freed.
        let error = unsafe {
            (*given).tensor.strides = strides.as_mut_ptr();
            OwnedTensor::take(given)
        };
        assert!(error.expect_err("a gap").contains("row-major"));
    }

    #[test]
    fn elements_are_in_the_order_of_their_table() {
        for (index, (element, ..)) in ELEMENTS.iter().enumerate() {
            assert_eq!(*element as usize, index);
            assert_eq!(ElementType::of(element.dtype()), Some(*element));
            assert_eq!(ElementType::named(element.name()), Some(*element));
        }
    }
}
