//! Runs a kernel given as PTX.

use simulator::driver::{
    cuLaunchKernel, cuMemAlloc_v2, cuMemFree_v2, cuMemcpyDtoH_v2, cuMemcpyHtoD_v2, cuModuleGetFunction,
    cuModuleLoadData,
};
use std::ffi::CString;
use std::ptr::{null, null_mut};

pub const LAUNCH_FAILED: i32 = 719;

/// An encoded tensor map, as a kernel receives it.
#[repr(C, align(64))]
#[derive(Clone)]
pub struct EncodedMap(pub [u8; 128]);

/// A launch of one block. %r1 is the thread's number, %rd2 the address of `words` in device memory and %rd1 that of the
/// thread's own word. Tensor maps, made from the address of `words`, are the parameters from `kernel_param_1` on.
pub struct TestLaunch<'a> {
    pub target: &'a str,
    pub threads: u32,
    pub shared_bytes: u32,
    pub maps: &'a dyn Fn(u64) -> Vec<EncodedMap>,
    pub words: &'a [u32],
    pub body: &'a str,
}

impl TestLaunch<'_> {
    fn text(&self, maps: usize) -> String {
        let map_parameters: String =
            (1..=maps).map(|at| format!(", .param .align 64 .b8 kernel_param_{at}[128]")).collect();
        let Self { target, body, .. } = self;
        format!(
            ".version 8.0
            .target {target}
            .address_size 64
            .extern .shared .align 1024 .b8 dynamic[];
            .visible .entry kernel(.param .u64 kernel_param_0{map_parameters})
            .maxntid 128, 1, 1
            {{
                .reg .pred %p<9>; .reg .b32 %r<32>; .reg .b64 %rd<32>; .reg .f32 %f<128>; .reg .b16 %h<9>;
                ld.param.u64 %rd2, [kernel_param_0];
                mov.u32 %r1, %tid.x;
                mad.wide.u32 %rd1, %r1, 4, %rd2;
                {body}
                ret;
            }}"
        )
    }

    /// Returns the words after the launch, or its status.
    pub fn run(&self) -> Result<Vec<u32>, i32> {
        let bytes = size_of_val(self.words);
        let mut module = null_mut();
        let mut function = null();
        let mut memory = 0;
        let mut out = vec![0; self.words.len()];
        // SAFETY: all pointers are to locals of the right size.
        unsafe {
            assert_eq!(cuMemAlloc_v2(&raw mut memory, bytes), 0);
            assert_eq!(cuMemcpyHtoD_v2(memory, self.words.as_ptr().cast(), bytes), 0);
            let maps = (self.maps)(memory);
            let text = CString::new(self.text(maps.len())).unwrap();
            assert_eq!(cuModuleLoadData(&raw mut module, text.as_ptr()), 0);
            assert_eq!(cuModuleGetFunction(&raw mut function, module, c"kernel".as_ptr()), 0);
            let mut arguments = vec![(&raw const memory).cast()];
            arguments.extend(maps.iter().map(|map| (&raw const *map).cast::<u8>()));
            let (threads, shared) = (self.threads, self.shared_bytes);
            let status =
                cuLaunchKernel(function, 1, 1, 1, threads, 1, 1, shared, null_mut(), arguments.as_ptr(), null_mut());
            assert_eq!(cuMemcpyDtoH_v2(out.as_mut_ptr().cast(), memory, bytes), 0);
            assert_eq!(cuMemFree_v2(memory), 0);
            if status == 0 { Ok(out) } else { Err(status) }
        }
    }
}
