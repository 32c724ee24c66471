//! The interface `clearform.branch/1`: a network beside the model that gives residuals for its blocks at each step.

use crate::dlpack::DLManagedTensorVersioned;
use crate::{ClearformFile, ClearformHost, ClearformText};
use std::ffi::c_void;

/// The control is latents, packed as the model takes its own: (batch, image tokens, channels).
pub const CONTROL_LATENTS: u32 = 1;
/// The control is a picture, (batch, 3, height, width).
pub const CONTROL_PIXELS: u32 = 2;

/// The model that a branch hangs on. Lent for the call of `open`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ClearformBase {
    /// Bytes of this struct.
    pub struct_size: u32,
    /// Zero.
    pub reserved: u32,
    /// Its family ("flux").
    pub family: ClearformText,
    /// Its diffusers config.json, complete.
    pub config: ClearformText,
    /// The attention that the branch shall have: `full`, or `clear:r=R`.
    pub attention: ClearformText,
}

/// What a branch takes. The host makes it empty and writes `struct_size`; the plugin fills in the rest.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ClearformBranchInfo {
    /// Bytes of this struct.
    pub struct_size: u32,
    /// [`CONTROL_LATENTS`] or [`CONTROL_PIXELS`].
    pub control: u32,
    /// Channels of the control.
    pub channels: u32,
    /// Modes that it knows (union ControlNets); 0 if it takes none.
    pub modes: u32,
    /// The pixel value that black becomes, before the VAE if the control is latents.
    pub low: f64,
    /// The pixel value that white becomes.
    pub high: f64,
}

/// One evaluation's input, named and shaped as the forward of the family's diffusers class has it, on the CPU. All of it
/// is lent for the call: deleters are not to be called. What is not there is null.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ClearformStep {
    /// Bytes of this struct.
    pub struct_size: u32,
    /// Zero.
    pub reserved: u32,
    /// Noisy latents, (batch, image tokens, channels).
    pub latents: *const DLManagedTensorVersioned,
    /// (batch).
    pub timestep: *const DLManagedTensorVersioned,
    /// Text features, (batch, text tokens, channels).
    pub text: *const DLManagedTensorVersioned,
    /// Pooled text features, (batch, channels).
    pub pooled: *const DLManagedTensorVersioned,
    /// Guidance scale, (batch), also for models that embed none.
    pub guidance: *const DLManagedTensorVersioned,
    /// Places of the image tokens, (image tokens, 3).
    pub image_ids: *const DLManagedTensorVersioned,
    /// Places of the text tokens, (text tokens, 3).
    pub text_ids: *const DLManagedTensorVersioned,
    /// The control, as [`ClearformBranchInfo`] asks for it.
    pub control: *const DLManagedTensorVersioned,
    /// Mode of each picture, (batch, 1), 64-bit integers.
    pub mode: *const DLManagedTensorVersioned,
}

/// Takes a residual, (batch, image tokens, width) in raster order, which belongs to the host from then on, and the
/// numbers of the model's blocks after which it is to be added: lent for the call. Called within `residuals`, by one thread
/// at a time.
pub type ClearformGiveResidual = unsafe extern "C" fn(
    context: *mut c_void,
    residual: *mut DLManagedTensorVersioned,
    blocks: *const u32,
    block_count: usize,
) -> i32;

/// The table of `clearform.branch/1`. Every function must be there. An instance is used from any thread, perhaps from
/// several at once; `close` comes alone and last.
#[repr(C)]
#[derive(Debug)]
pub struct ClearformBranchTable {
    /// Bytes of this struct.
    pub struct_size: u32,
    /// Zero.
    pub reserved: u32,
    /// Opens a file that the plugin's claims fit, for the model `base`. `host` and `file` are lent until `close`. Writes an instance of the plugin's own.
    pub open: Option<
        unsafe extern "C" fn(
            host: *const ClearformHost,
            file: *const ClearformFile,
            base: *const ClearformBase,
            instance: *mut *mut c_void,
        ) -> i32,
    >,
    /// Frees an instance. Tensors that the host has of it stay valid.
    pub close: Option<unsafe extern "C" fn(instance: *mut c_void)>,
    /// Says what it takes.
    pub info: Option<unsafe extern "C" fn(instance: *mut c_void, info: *mut ClearformBranchInfo) -> i32>,
    /// Computes one evaluation's residuals and calls `give` with `context` for each. The host scales them.
    pub residuals: Option<
        unsafe extern "C" fn(
            instance: *mut c_void,
            step: *const ClearformStep,
            give: Option<ClearformGiveResidual>,
            context: *mut c_void,
        ) -> i32,
    >,
}
