//! The driver's own interface, so far as it is used: one device, whose work is done when a call returns.

use crate::device::device;
use crate::instruction::WARP;
use crate::launch::launch;
use crate::program::Program;
use crate::report::count;
use crate::text::Module;
use crate::{memory, report};
use std::cell::Cell;
use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr::{copy, null_mut};
use std::time::Instant;

pub(crate) const OK: c_int = 0;
pub(crate) const INVALID_VALUE: c_int = 1;
const OUT_OF_MEMORY: c_int = 2;
const NO_BINARY_FOR_GPU: c_int = 209;
const NOT_FOUND: c_int = 500;
const ILLEGAL_ADDRESS: c_int = 700;
const LAUNCH_FAILED: c_int = 719;

thread_local! {
    static CONTEXT: Cell<*mut c_void> = const { Cell::new(null_mut()) };
}

/// A module that was loaded; functions point into it.
struct Loaded {
    module: Module,
    globals: HashMap<String, u64>,
    programs: HashMap<String, Box<Program>>,
}

/// Any address that is not null: there is one context, and streams differ in nothing.
pub(crate) fn handle() -> *mut c_void {
    std::ptr::dangling_mut::<u64>().cast()
}

/// Writes a result.
///
/// # Safety
/// `to` is null or may be written.
pub(crate) unsafe fn give<T>(to: *mut T, value: T) -> c_int {
    if to.is_null() {
        return INVALID_VALUE;
    }
    // SAFETY: the caller's promise.
    unsafe { to.write(value) };
    OK
}

/// Functions as C calls them, which give a status.
macro_rules! interface {
    ($(fn $name:ident($($argument:ident: $type:ty),*) $body:block)*) => { $(
        /// As the driver's.
        ///
        /// # Safety
        /// As the driver's.
        #[unsafe(no_mangle)]
        #[allow(non_snake_case)]
        pub unsafe extern "C" fn $name($($argument: $type),*) -> c_int $body
    )* };
}

pub(crate) use interface;

interface! {
    fn cuInit(_flags: u32) { OK }
    fn cuDriverGetVersion(version: *mut c_int) {
        // SAFETY: the caller's promise.
        unsafe { give(version, 13000) }
    }
    fn cuDeviceGet(device: *mut c_int, number: c_int) {
        if number != 0 {
            return 101; // no such device
        }
        // SAFETY: the caller's promise.
        unsafe { give(device, 0) }
    }
    fn cuDeviceGetCount(count: *mut c_int) {
        // SAFETY: the caller's promise.
        unsafe { give(count, 1) }
    }
    fn cuDeviceGetName(name: *mut c_char, length: c_int, _device: c_int) {
        let text = device().name;
        if (length as usize) < text.count_bytes() + 1 {
            return INVALID_VALUE;
        }
        // SAFETY: there is room for it.
        unsafe { copy(text.as_ptr(), name, text.count_bytes() + 1) };
        OK
    }
    fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, _device: c_int) {
        let found = match attribute {
            1..=3 => 1024, // threads of a block; along x and y
            4 => 64,
            5 => i32::MAX,     // blocks along x, y and z
            6 | 7 => 65535,
            8 => 48 << 10,     // shared memory of a block
            10 => WARP as c_int,
            16 => 108,         // multiprocessors
            75 => (device().capability / 10) as c_int,
            76 => (device().capability % 10) as c_int,
            97 => device().shared_bytes as c_int,
            115 => 1,          // memory in the order of streams
            _ => 0,
        };
        // SAFETY: the caller's promise.
        unsafe { give(value, found) }
    }
    fn cuDevicePrimaryCtxRetain(context: *mut *mut c_void, _device: c_int) {
        // SAFETY: the caller's promise.
        unsafe { give(context, handle()) }
    }
    fn cuDevicePrimaryCtxRelease_v2(_device: c_int) { OK }
    fn cuCtxDestroy_v2(_context: *mut c_void) { OK }
    fn cuCtxSynchronize() { OK }
    fn cuCtxSetCurrent(context: *mut c_void) {
        CONTEXT.set(context);
        OK
    }
    fn cuCtxGetCurrent(context: *mut *mut c_void) {
        // SAFETY: the caller's promise.
        unsafe { give(context, CONTEXT.get()) }
    }
    fn cuGetErrorString(error: c_int, text: *mut *const c_char) {
        let words = match error {
            OK => c"no error",
            INVALID_VALUE => c"an argument is not valid",
            OUT_OF_MEMORY => c"out of memory",
            NO_BINARY_FOR_GPU => c"code for another device",
            NOT_FOUND => c"no such name",
            ILLEGAL_ADDRESS => c"an address that is not allocated",
            LAUNCH_FAILED => c"a kernel failed; the simulator's report says where",
            _ => c"an error of the simulator",
        };
        // SAFETY: the caller's promise.
        unsafe { give(text, words.as_ptr()) }
    }
    fn cuStreamCreate(stream: *mut *mut c_void, _flags: u32) {
        // SAFETY: the caller's promise.
        unsafe { give(stream, handle()) }
    }
    fn cuStreamDestroy_v2(_stream: *mut c_void) { OK }
    fn cuStreamSynchronize(_stream: *mut c_void) { OK }
    fn cuStreamWaitEvent(_stream: *mut c_void, _event: *mut c_void, _flags: u32) { OK }
    fn cuStreamIsCapturing(_stream: *mut c_void, status: *mut c_int) {
        // SAFETY: the caller's promise.
        unsafe { give(status, 0) }
    }
    fn cuEventCreate(event: *mut *mut Instant, _flags: u32) {
        // SAFETY: the caller's promise.
        unsafe { give(event, Box::into_raw(Box::new(Instant::now()))) }
    }
    fn cuEventDestroy_v2(event: *mut Instant) {
        // SAFETY: made by `cuEventCreate`.
        drop(unsafe { Box::from_raw(event) });
        OK
    }
    fn cuEventRecord(event: *mut Instant, _stream: *mut c_void) {
        // SAFETY: made by `cuEventCreate`.
        unsafe { give(event, Instant::now()) }
    }
    fn cuEventSynchronize(_event: *mut Instant) { OK }
    fn cuEventElapsedTime(milliseconds: *mut f32, begin: *mut Instant, end: *mut Instant) {
        // SAFETY: both made by `cuEventCreate`.
        unsafe { give(milliseconds, (*end).duration_since(*begin).as_secs_f32() * 1e3) }
    }
    fn cuMemAlloc_v2(address: *mut u64, bytes: usize) {
        // As the driver, which has no empty memory.
        if bytes == 0 {
            report::problem("no bytes are asked for, which the driver refuses");
            return INVALID_VALUE;
        }
        match memory::allocate(bytes) {
            0 => OUT_OF_MEMORY,
            // SAFETY: the caller's promise.
            found => unsafe { give(address, found) },
        }
    }
    fn cuMemAllocAsync(address: *mut u64, bytes: usize, _stream: *mut c_void) {
        // SAFETY: the caller's promise.
        unsafe { cuMemAlloc_v2(address, bytes) }
    }
    fn cuDeviceGetDefaultMemPool(pool: *mut *mut c_void, _device: c_int) {
        // SAFETY: the caller's promise.
        unsafe { give(pool, handle()) }
    }
    fn cuMemPoolSetAttribute(_pool: *mut c_void, _attribute: c_int, _value: *mut c_void) { OK }
    fn cuMemHostAlloc(address: *mut u64, bytes: usize, _flags: u32) {
        // SAFETY: the caller's promise.
        unsafe { give(address, memory::allocate(bytes)) }
    }
    fn cuMemFree_v2(address: u64) {
        if memory::free(address) { OK } else { ILLEGAL_ADDRESS }
    }
    fn cuMemFreeAsync(address: u64, _stream: *mut c_void) {
        // SAFETY: the caller's promise.
        unsafe { cuMemFree_v2(address) }
    }
    fn cuMemFreeHost(address: u64) {
        // SAFETY: the caller's promise.
        unsafe { cuMemFree_v2(address) }
    }
    fn cuMemcpyHtoD_v2(to: u64, from: *const u8, bytes: usize) {
        if !memory::holds(to, bytes) {
            return ILLEGAL_ADDRESS;
        }
        count("bytes to the device", bytes);
        // SAFETY: the device has room, the host the caller's promise.
        unsafe { copy(from, to as *mut u8, bytes) };
        OK
    }
    fn cuMemcpyDtoH_v2(to: *mut u8, from: u64, bytes: usize) {
        if !memory::holds(from, bytes) {
            return ILLEGAL_ADDRESS;
        }
        count("bytes from the device", bytes);
        // SAFETY: as above.
        unsafe { copy(from as *const u8, to, bytes) };
        OK
    }
    fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, _stream: *mut c_void) {
        if !memory::holds(from, bytes) || !memory::holds(to, bytes) {
            return ILLEGAL_ADDRESS;
        }
        // SAFETY: both are there.
        unsafe { copy(from as *const u8, to as *mut u8, bytes) };
        OK
    }
    fn cuMemcpyHtoDAsync_v2(to: u64, from: *const u8, bytes: usize, _stream: *mut c_void) {
        // SAFETY: the caller's promise.
        unsafe { cuMemcpyHtoD_v2(to, from, bytes) }
    }
    fn cuMemcpyDtoHAsync_v2(to: *mut u8, from: u64, bytes: usize, _stream: *mut c_void) {
        // SAFETY: the caller's promise.
        unsafe { cuMemcpyDtoH_v2(to, from, bytes) }
    }
    fn cuMemcpyPeerAsync(to: u64, _there: *mut c_void, from: u64, _here: *mut c_void, bytes: usize, stream: *mut c_void) {
        // SAFETY: the caller's promise.
        unsafe { cuMemcpyDtoDAsync_v2(to, from, bytes, stream) }
    }
    fn cuMemsetD8Async(to: u64, value: u8, bytes: usize, _stream: *mut c_void) {
        if !memory::holds(to, bytes) {
            return ILLEGAL_ADDRESS;
        }
        // SAFETY: it is there.
        unsafe { (to as *mut u8).write_bytes(value, bytes) };
        OK
    }
    fn cuModuleLoadData(module: *mut *mut c_void, image: *const c_char) {
        // SAFETY: the caller gives text that ends with a zero.
        let text = unsafe { CStr::from_ptr(image) }.to_string_lossy();
        match Module::new(&text) {
            Ok(parsed) if !device().runs(&parsed.target) => {
                report::problem(&format!("a module for {} on a {:?}", parsed.target, device().name));
                NO_BINARY_FOR_GPU
            }
            Ok(parsed) => {
                let mut globals = HashMap::new();
                for variable in parsed.variables.iter().filter(|one| one.space != "shared") {
                    let address = memory::allocate(variable.bytes);
                    if variable.initial.len() <= variable.bytes && address != 0 {
                        // SAFETY: it has room.
                        unsafe { copy(variable.initial.as_ptr(), address as *mut u8, variable.initial.len()) };
                    }
                    globals.insert(variable.name.clone(), address);
                }
                let loaded = Loaded { module: parsed, globals, programs: HashMap::new() };
                // SAFETY: the caller's promise.
                unsafe { give(module, Box::into_raw(Box::new(loaded)).cast()) }
            }
            Err(problem) => {
                report::problem(&format!("a module that is not understood: {problem}"));
                218 // not PTX
            }
        }
    }
    fn cuModuleLoad(_module: *mut *mut c_void, _file: *const c_char) { NOT_FOUND } // modules come as text
    // Functions may outlive their module here: it is kept.
    fn cuModuleUnload(_module: *mut c_void) { OK }
    fn cuModuleGetFunction(function: *mut *const Program, module: *mut c_void, name: *const c_char) {
        // SAFETY: made by `cuModuleLoadData`, and modules are used by one thread at a time, as candle's lock has it.
        let loaded = unsafe { &mut *module.cast::<Loaded>() };
        // SAFETY: the caller's promise.
        let name = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
        if !loaded.programs.contains_key(&name) {
            let Some(kernel) = loaded.module.kernel(&name) else { return NOT_FOUND };
            let program = kernel.and_then(|kernel| {
                Program::new(&name, &kernel, &loaded.module.variables, &loaded.globals)
            });
            match program {
                Ok(program) => drop(loaded.programs.insert(name.clone(), Box::new(program))),
                Err(problem) => {
                    report::problem(&format!("{name}: {problem}"));
                    return LAUNCH_FAILED;
                }
            }
        }
        // SAFETY: the caller's promise.
        unsafe { give(function, &raw const *loaded.programs[&name]) }
    }
    fn cuFuncSetAttribute(_function: *const Program, attribute: c_int, value: c_int) {
        // Most dynamic shared memory.
        if attribute == 8 && value as usize > device().shared_bytes { INVALID_VALUE } else { OK }
    }
    fn cuLaunchKernel(
        function: *const Program, x: u32, y: u32, z: u32, threads_x: u32, threads_y: u32, threads_z: u32,
        shared_bytes: u32, _stream: *mut c_void, arguments: *const *const u8, _extra: *mut c_void
    ) {
        // SAFETY: made by `cuModuleGetFunction`.
        let program = unsafe { &*function };
        let (blocks, threads) = ([x, y, z], [threads_x, threads_y, threads_z]);
        let too_many = threads.iter().product::<u32>() > 1024 || y > 65535 || z > 65535;
        let shared = program.shared_bytes + shared_bytes as usize;
        if blocks.contains(&0) || threads.contains(&0) || too_many || shared > device().shared_bytes {
            report::problem(&format!("{}: a grid of {blocks:?} of {threads:?} with {shared_bytes} bytes", program.name));
            return INVALID_VALUE;
        }
        let mut parameters = vec![0; program.parameter_bytes()];
        for (at, (begin, bytes)) in program.parameters.iter().enumerate() {
            // SAFETY: the caller gives an argument for each parameter.
            unsafe { copy(*arguments.add(at), parameters[*begin..].as_mut_ptr(), *bytes) };
        }
        count(&program.name, 1);
        match launch(program, &parameters, blocks, threads, shared_bytes as usize) {
            Ok(()) => OK,
            Err(problem) => {
                report::problem(&format!("{}: {problem}", program.name));
                LAUNCH_FAILED
            }
        }
    }
}
