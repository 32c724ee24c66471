//! [`ControlNetPlugin`]: a plugin for `clearform.branch/1`.

use super::Result;
use super::file::AdapterFile;
use super::instance::{close, copy_from_host, copy_to_host, guard, instance, store_instance};
use crate::dlpack::DLManagedTensorVersioned;
use crate::tensor::{BorrowedTensor, OwnedTensor};
use crate::{
    CONTROL_LATENTS, ClearformBase, ClearformBranchInfo, ClearformBranchTable, ClearformFile, ClearformGiveResidual,
    ClearformHost, ClearformStep, ClearformText, EMBEDDED_LATENTS, OK, UNSHIFTED_CONTROL, ZERO_POOLED,
};
use std::ffi::c_void;

/// The model that the ControlNet runs beside.
#[derive(Debug, Clone)]
pub struct TargetModel {
    /// Family, such as "flux".
    pub family: String,
    /// The model's diffusers config.json.
    pub config: String,
    /// Attention for the ControlNet to use: `full`, or `clear:r=R`.
    pub attention: String,
}

/// The input of one evaluation.
#[derive(Debug, Clone, Copy)]
pub struct StepInput<'a> {
    /// Noisy latents: (batch, image tokens, channels) where the model takes packed latents, else (batch, channels,
    /// height, width).
    pub latents: BorrowedTensor<'a>,
    /// (batch).
    pub timestep: BorrowedTensor<'a>,
    /// Text embeddings, (batch, text tokens, channels).
    pub text: Option<BorrowedTensor<'a>>,
    /// Pooled text embeddings, (batch, channels).
    pub pooled: Option<BorrowedTensor<'a>>,
    /// Guidance scale, (batch).
    pub guidance: Option<BorrowedTensor<'a>>,
    /// Positions of the image tokens, (image tokens, 3).
    pub image_ids: Option<BorrowedTensor<'a>>,
    /// Positions of the text tokens, (text tokens, 3).
    pub text_ids: Option<BorrowedTensor<'a>>,
    /// The control, as [`ControlSpec`] describes it.
    pub control: BorrowedTensor<'a>,
    /// Mode of each image, (batch, 1).
    pub mode: Option<BorrowedTensor<'a>>,
    /// The latents as the model embeds them, (batch, image tokens, width) in raster order; only with
    /// [`ControlSpec::embedded_latents`].
    pub embedded: Option<BorrowedTensor<'a>>,
}

/// A residual, and the blocks of the model whose outputs it is added to.
#[derive(Debug)]
pub struct BlockResidual {
    /// (batch, image tokens, width), raster order.
    pub tensor: OwnedTensor,
    /// Indexes of blocks, from 0, in the order in which the model runs them.
    pub blocks: Vec<u32>,
}

/// The control that a ControlNet expects. The default is latents without channels, which is no control yet.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ControlSpec {
    /// [`crate::CONTROL_LATENTS`] or [`crate::CONTROL_PIXELS`].
    pub control: u32,
    /// Channels of the control.
    pub channels: u32,
    /// Number of modes of a union ControlNet; 0 if it has none.
    pub modes: u32,
    /// Pixel values for black and white.
    pub range: [f64; 2],
    /// Whether control latents are scaled as the model's own, but not shifted.
    pub unshifted: bool,
    /// Whether the pooled text of every step is to be zero.
    pub zero_pooled: bool,
    /// Whether it takes the latents as the model embeds them, [`StepInput::embedded`].
    pub embedded_latents: bool,
}

impl Default for ControlSpec {
    fn default() -> Self {
        Self {
            control: CONTROL_LATENTS,
            channels: 0,
            modes: 0,
            range: [-1.0, 1.0],
            unshifted: false,
            zero_pooled: false,
            embedded_latents: false,
        }
    }
}

impl ControlSpec {
    fn to_c(self) -> ClearformBranchInfo {
        let Self { control, channels, modes, range: [low, high], .. } = self;
        let flag = |is_set: bool, flag: u32| if is_set { flag } else { 0 };
        let flags = flag(self.unshifted, UNSHIFTED_CONTROL)
            | flag(self.zero_pooled, ZERO_POOLED)
            | flag(self.embedded_latents, EMBEDDED_LATENTS);
        ClearformBranchInfo { control, channels, modes, low, high, flags, ..ClearformBranchInfo::EMPTY }
    }
}

/// A plugin for `clearform.branch/1`: a ControlNet, or a similar network that adds residuals to the model's blocks.
pub trait ControlNetPlugin: Send + Sync + Sized {
    /// Opens a file that matches the plugin's claims, for `model`.
    ///
    /// # Errors
    /// What is wrong with the file, or that it was made for another model, and what to do about it.
    fn open(file: AdapterFile, model: TargetModel) -> Result<Self>;

    /// The control that it expects.
    fn control_spec(&self) -> ControlSpec;

    /// The residuals of one evaluation.
    ///
    /// # Errors
    /// An input that it cannot use.
    fn residuals(&self, step: &StepInput) -> Result<Vec<BlockResidual>>;
}

impl ClearformBranchTable {
    /// The table of the plugin `T`.
    pub const fn of<T: ControlNetPlugin>() -> Self {
        Self {
            struct_size: size_of::<Self>() as u32,
            reserved: 0,
            open: Some(open::<T>),
            close: Some(close::<T>),
            info: Some(info::<T>),
            residuals: Some(residuals::<T>),
        }
    }
}

// Only the host calls the functions below, and it follows the comments of the tables: pointers are valid, instances
// come from `open` of the same table, and none is used after `close`. The SAFETY comments refer to this as the host's
// contract.

unsafe extern "C" fn open<T: ControlNetPlugin>(
    host: *const ClearformHost,
    file: *const ClearformFile,
    base: *const ClearformBase,
    out: *mut *mut c_void,
) -> i32 {
    guard(host, || {
        // SAFETY: the host's contract.
        let model = unsafe { TargetModel::new(&*base) };
        let plugin = T::open(AdapterFile { file, host }, model)?;
        // SAFETY: the host's contract.
        unsafe { store_instance(host, plugin, out) };
        Ok(())
    })
}

unsafe extern "C" fn info<T: ControlNetPlugin>(pointer: *mut c_void, out: *mut ClearformBranchInfo) -> i32 {
    // SAFETY: the host's contract.
    let instance = unsafe { instance::<T>(pointer) };
    guard(instance.host, || {
        let info = instance.plugin.control_spec().to_c();
        // SAFETY: the host's contract. Only the size is read.
        let size = unsafe { *out.cast::<u32>() };
        if info.flags != 0 && size < info.struct_size {
            return Err("it needs a newer version of clearform, which passes it what its network takes".to_owned());
        }
        // SAFETY: the host's contract.
        unsafe { copy_to_host(out, info, size) };
        Ok(())
    })
}

unsafe extern "C" fn residuals<T: ControlNetPlugin>(
    pointer: *mut c_void,
    step: *const ClearformStep,
    give: Option<ClearformGiveResidual>,
    context: *mut c_void,
) -> i32 {
    // SAFETY: the host's contract.
    let instance = unsafe { instance::<T>(pointer) };
    guard(instance.host, || {
        let give = give.ok_or("the host's function \"give\" is null")?;
        // SAFETY: the host's contract: the step and its tensors are valid during the call.
        let input = unsafe { StepInput::new(copy_from_host(step, ClearformStep::EMPTY)) }?;
        for BlockResidual { tensor, blocks } in instance.plugin.residuals(&input)? {
            // SAFETY: the host's contract; the host owns the tensor from here on, whatever it returns.
            let status = unsafe { give(context, tensor.into_raw(), blocks.as_ptr(), blocks.len()) };
            if status != OK {
                return Err("the host rejected a residual".to_owned());
            }
        }
        Ok(())
    })
}

impl TargetModel {
    /// # Safety
    /// The texts of `base` are valid.
    unsafe fn new(base: &ClearformBase) -> Self {
        // SAFETY: guaranteed by the caller.
        let copy = |text: &ClearformText| unsafe { text.as_str() }.unwrap_or_default().to_owned();
        Self { family: copy(&base.family), config: copy(&base.config), attention: copy(&base.attention) }
    }
}

impl<'a> StepInput<'a> {
    /// # Safety
    /// The tensors of `step` are valid for `'a`.
    unsafe fn new(step: ClearformStep) -> Result<Self> {
        let required = |name: &str, tensor: *const DLManagedTensorVersioned| {
            // SAFETY: guaranteed by the caller.
            unsafe { BorrowedTensor::from_raw(tensor) }.map_err(|reason| format!("input {name:?}: {reason}"))
        };
        let optional = |name: &str, tensor: *const DLManagedTensorVersioned| {
            (!tensor.is_null()).then(|| required(name, tensor)).transpose()
        };
        Ok(Self {
            latents: required("latents", step.latents)?,
            timestep: required("timestep", step.timestep)?,
            text: optional("text", step.text)?,
            pooled: optional("pooled", step.pooled)?,
            guidance: optional("guidance", step.guidance)?,
            image_ids: optional("image_ids", step.image_ids)?,
            text_ids: optional("text_ids", step.text_ids)?,
            control: required("control", step.control)?,
            mode: optional("mode", step.mode)?,
            embedded: optional("embedded", step.embedded)?,
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::FAILED;
    use crate::sdk::instance::store_instance;
    use crate::tensor::ElementType;
    use std::mem::offset_of;

    /// A network that says whether it got the embedded latents: its residual is for block 1 or 0.
    struct Echo(bool);

    impl ControlNetPlugin for Echo {
        fn open(_: AdapterFile, _: TargetModel) -> Result<Self> {
            Ok(Self(false))
        }

        fn control_spec(&self) -> ControlSpec {
            ControlSpec { channels: 16, modes: 3, embedded_latents: self.0, ..ControlSpec::default() }
        }

        fn residuals(&self, step: &StepInput) -> Result<Vec<BlockResidual>> {
            let tensor = OwnedTensor::new([0u8; 4], ElementType::F32, &[1, 1, 1]);
            Ok(vec![BlockResidual { tensor, blocks: vec![u32::from(step.embedded.is_some())] }])
        }
    }

    /// The sizes of both structs in the first revision of the interface.
    const FIRST_INFO: usize = offset_of!(ClearformBranchInfo, flags);
    const FIRST_STEP: usize = offset_of!(ClearformStep, embedded);

    fn with_instance<T>(plugin: Echo, work: impl FnOnce(*mut c_void) -> T) -> T {
        let mut pointer = std::ptr::null_mut();
        // SAFETY: the pointer is valid for writing, and closed after the work.
        unsafe {
            store_instance(std::ptr::null(), plugin, &raw mut pointer);
            let result = work(pointer);
            close::<Echo>(pointer);
            result
        }
    }

    /// Status and info for a host whose struct has `size` bytes; what lies beyond must stay untouched.
    fn info_for(size: usize, plugin: Echo) -> (i32, ClearformBranchInfo) {
        let untouched = 77;
        let mut out = ClearformBranchInfo { struct_size: size as u32, flags: untouched, ..ClearformBranchInfo::EMPTY };
        let status = with_instance(plugin, |pointer| {
            // SAFETY: the instance is open and the struct ours.
            unsafe { info::<Echo>(pointer, &raw mut out) }
        });
        assert!(size > FIRST_INFO || out.flags == untouched);
        (status, out)
    }

    #[test]
    fn an_older_host_gets_what_it_knows() {
        let (status, info) = info_for(FIRST_INFO, Echo(false));
        assert_eq!((status, info.channels, info.modes, info.high), (OK, 16, 3, 1.0));
        let (status, info) = info_for(size_of::<ClearformBranchInfo>(), Echo(true));
        assert_eq!((status, info.channels, info.flags), (OK, 16, EMBEDDED_LATENTS));
    }

    #[test]
    fn what_an_older_host_does_not_know_is_refused() {
        let (status, info) = info_for(FIRST_INFO, Echo(true));
        assert_eq!((status, info.channels), (FAILED, 0));
    }

    #[test]
    fn the_step_of_an_older_host_is_read_up_to_its_size() {
        unsafe extern "C" fn give(
            context: *mut c_void,
            residual: *mut DLManagedTensorVersioned,
            blocks: *const u32,
            _: usize,
        ) -> i32 {
            // SAFETY: the context is the test's number; the residual is ours and freed here.
            unsafe {
                *context.cast::<u32>() = *blocks;
                drop(OwnedTensor::from_raw(residual));
            }
            OK
        }
        let tensor = OwnedTensor::new([0u8; 4], ElementType::F32, &[1]);
        let pointer = tensor.as_ptr();
        let step = |size: usize| ClearformStep {
            struct_size: size as u32,
            latents: pointer,
            timestep: pointer,
            control: pointer,
            embedded: pointer,
            ..ClearformStep::EMPTY
        };
        for (size, block) in [(FIRST_STEP, 0), (size_of::<ClearformStep>(), 1)] {
            let step = step(size);
            let mut given = 9u32;
            let status = with_instance(Echo(true), |instance| {
                // SAFETY: the instance is open; step and number live during the call.
                unsafe { residuals::<Echo>(instance, &raw const step, Some(give), (&raw mut given).cast()) }
            });
            assert_eq!((status, given), (OK, block), "{size}");
        }
    }
}
