//! Interface `clearform.branch/1`: a network beside the model computes residuals for its blocks at each step.

use crate::dlpack::DLManagedTensorVersioned;
use crate::host::{ClearformFile, ClearformHost, ClearformText};
use std::ffi::c_void;

/// The control is latents in the form of the model's own: (batch, image tokens, channels) where the model takes packed
/// latents, else (batch, channels, height, width).
pub const CONTROL_LATENTS: u32 = 1;
/// The control is an image, (batch, 3, height, width).
pub const CONTROL_PIXELS: u32 = 2;

/// Flag of [`ClearformBranchInfo`]: control latents are scaled as the model's own, but not shifted.
pub const UNSHIFTED_CONTROL: u32 = 1;
/// Flag of [`ClearformBranchInfo`]: the pooled text of every step is zero.
pub const ZERO_POOLED: u32 = 2;
/// Flag of [`ClearformBranchInfo`]: the network takes [`ClearformStep::embedded`].
pub const EMBEDDED_LATENTS: u32 = 4;

/// The model that the ControlNet runs beside. Borrowed for the call of `open`, with its texts.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ClearformBase {
    /// Size of this struct in bytes.
    pub struct_size: u32,
    /// Zero.
    pub reserved: u32,
    /// Family, such as "flux".
    pub family: ClearformText,
    /// The model's complete diffusers config.json.
    pub config: ClearformText,
    /// Attention for the ControlNet to use: `full`, or `clear:r=R`.
    pub attention: ClearformText,
}

/// The input that a ControlNet expects. The host zeroes it and sets `struct_size`; the plugin fills in the rest.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ClearformBranchInfo {
    /// Size of this struct in bytes. Set by the host.
    pub struct_size: u32,
    /// [`CONTROL_LATENTS`] or [`CONTROL_PIXELS`].
    pub control: u32,
    /// Channels of the control.
    pub channels: u32,
    /// Number of modes of a union ControlNet; 0 if it has none.
    pub modes: u32,
    /// Pixel value for black; the input of the VAE if the control is latents.
    pub low: f64,
    /// Pixel value for white.
    pub high: f64,
    /// [`UNSHIFTED_CONTROL`] and so on, or zero. The first revision of the interface ends before this field.
    pub flags: u32,
    /// Zero.
    pub reserved: u32,
}

/// The input of one evaluation, on the CPU, with the shapes of the forward method of the family's diffusers class. It
/// is borrowed for the call: do not call the deleters. Tensors that the model does not use are null.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ClearformStep {
    /// Size of this struct in bytes.
    pub struct_size: u32,
    /// Zero.
    pub reserved: u32,
    /// Noisy latents: (batch, image tokens, channels) where the model takes packed latents, else (batch, channels,
    /// height, width).
    pub latents: *const DLManagedTensorVersioned,
    /// (batch).
    pub timestep: *const DLManagedTensorVersioned,
    /// Text embeddings, (batch, text tokens, channels).
    pub text: *const DLManagedTensorVersioned,
    /// Pooled text embeddings, (batch, channels).
    pub pooled: *const DLManagedTensorVersioned,
    /// Guidance scale, (batch), also if the model embeds none.
    pub guidance: *const DLManagedTensorVersioned,
    /// Positions of the image tokens, (image tokens, 3).
    pub image_ids: *const DLManagedTensorVersioned,
    /// Positions of the text tokens, (text tokens, 3).
    pub text_ids: *const DLManagedTensorVersioned,
    /// The control, as [`ClearformBranchInfo`] describes it.
    pub control: *const DLManagedTensorVersioned,
    /// Mode of each image, (batch, 1), 64-bit integers.
    pub mode: *const DLManagedTensorVersioned,
    /// The latents as the model embeds them before its first block, (batch, image tokens, width) in raster order. Null
    /// without [`EMBEDDED_LATENTS`]. The first revision of the interface ends before this field.
    pub embedded: *const DLManagedTensorVersioned,
}

impl ClearformBranchInfo {
    /// An info whose size is set and everything else zero, as the host passes it.
    pub const EMPTY: Self = Self {
        struct_size: size_of::<Self>() as u32,
        control: 0,
        channels: 0,
        modes: 0,
        low: 0.0,
        high: 0.0,
        flags: 0,
        reserved: 0,
    };
}

impl ClearformStep {
    /// A step whose size is set and whose tensors are all null.
    pub const EMPTY: Self = Self {
        struct_size: size_of::<Self>() as u32,
        reserved: 0,
        latents: std::ptr::null(),
        timestep: std::ptr::null(),
        text: std::ptr::null(),
        pooled: std::ptr::null(),
        guidance: std::ptr::null(),
        image_ids: std::ptr::null(),
        text_ids: std::ptr::null(),
        control: std::ptr::null(),
        mode: std::ptr::null(),
        embedded: std::ptr::null(),
    };
}

/// Passes a residual, (batch, image tokens, width) in raster order, to the host, with the indexes of the model's blocks
/// whose outputs it is added to. The host owns the residual from then on, whatever it returns; `blocks` is borrowed for
/// the call. Called only within `residuals`, by one thread at a time.
pub type ClearformGiveResidual = unsafe extern "C" fn(
    context: *mut c_void,
    residual: *mut DLManagedTensorVersioned,
    blocks: *const u32,
    block_count: usize,
) -> i32;

/// The function table of `clearform.branch/1`. No function may be null. The host may use an instance from any thread,
/// and from several at once; `close` is the last call and runs alone.
#[repr(C)]
#[derive(Debug)]
pub struct ClearformBranchTable {
    /// Size of this struct in bytes.
    pub struct_size: u32,
    /// Zero.
    pub reserved: u32,
    /// Opens a file that matches the plugin's claims, for the model `base`. `host` and `file` are borrowed until
    /// `close`, `base` for the call. Stores a new instance in `instance` if it succeeds; the plugin frees it in
    /// `close`.
    pub open: Option<
        unsafe extern "C" fn(
            host: *const ClearformHost,
            file: *const ClearformFile,
            base: *const ClearformBase,
            instance: *mut *mut c_void,
        ) -> i32,
    >,
    /// Frees an instance. Tensors that the host received from it stay valid.
    pub close: Option<unsafe extern "C" fn(instance: *mut c_void)>,
    /// Describes the expected control. `info` is borrowed for the call.
    pub info: Option<unsafe extern "C" fn(instance: *mut c_void, info: *mut ClearformBranchInfo) -> i32>,
    /// Computes the residuals of one evaluation and calls `give` with `context` for each. The host scales them. `step`
    /// is borrowed for the call.
    pub residuals: Option<
        unsafe extern "C" fn(
            instance: *mut c_void,
            step: *const ClearformStep,
            give: Option<ClearformGiveResidual>,
            context: *mut c_void,
        ) -> i32,
    >,
}
