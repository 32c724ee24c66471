//! Modules, functions and launches.

use super::{INVALID_PTX, INVALID_VALUE, LAUNCH_FAILED, NO_BINARY_FOR_GPU, NOT_FOUND, OK, interface, return_value};
use crate::decode::decode;
use crate::device::device;
use crate::launch::{Grid, launch};
use crate::memory;
use crate::program::Program;
use crate::ptx::Module;
use crate::report::{count, problem};
use crate::schedule::Schedule;
use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr::copy;

/// What a file of machine code (a cubin) begins with.
const ELF: &[u8] = b"\x7fELF";

/// A loaded module. Functions point into it.
struct LoadedModule {
    module: Module,
    /// Addresses of its global variables.
    globals: HashMap<String, u64>,
    /// Kernels that were looked up.
    programs: HashMap<String, Box<Program>>,
}

impl LoadedModule {
    /// Parses PTX and allocates its global variables.
    fn load(text: &str) -> Result<Self, c_int> {
        let module = Module::new(text).map_err(|error| {
            problem(&format!("a module cannot be parsed: {error}"));
            INVALID_PTX
        })?;
        if !device().runs(&module.target) {
            problem(&format!("a module for {} on a {:?}", module.target, device().name));
            return Err(NO_BINARY_FOR_GPU);
        }
        let mut globals = HashMap::new();
        for variable in module.variables.iter().filter(|variable| variable.space != "shared") {
            let address = memory::allocate(variable.bytes);
            if variable.initial.len() <= variable.bytes && address != 0 {
                // SAFETY: the allocation is at least this large.
                unsafe { copy(variable.initial.as_ptr(), address as *mut u8, variable.initial.len()) };
            }
            globals.insert(variable.name.clone(), address);
        }
        Ok(Self { module, globals, programs: HashMap::new() })
    }

    /// Decodes a kernel the first time it is looked up.
    fn function(&mut self, name: &str) -> Result<*const Program, c_int> {
        if !self.programs.contains_key(name) {
            let kernel = self.module.kernel(name).ok_or(NOT_FOUND)?;
            let program = kernel.and_then(|kernel| decode(name, &kernel, &self.module.variables, &self.globals));
            let program = program.map_err(|error| {
                problem(&format!("{name}: {error}"));
                LAUNCH_FAILED
            })?;
            self.programs.insert(name.to_owned(), Box::new(program));
        }
        Ok(&raw const *self.programs[name])
    }
}

/// Whether the device takes a grid.
fn is_valid(grid: &Grid, program: &Program) -> bool {
    let [_, y, z] = grid.blocks;
    let empty = grid.blocks.contains(&0) || grid.threads.contains(&0);
    let too_many = grid.threads.iter().product::<u32>() > 1024 || y > 65535 || z > 65535;
    !empty && !too_many && program.shared_bytes + grid.shared_bytes <= device().shared_bytes
}

interface! {
    fn cuModuleLoadData(module: *mut *mut c_void, image: *const c_char) {
        if image.is_null() {
            return INVALID_VALUE;
        }
        // SAFETY: the caller passes text that ends with a zero, or an ELF file, whose first bytes include a zero.
        let image = unsafe { CStr::from_ptr(image) };
        // Machine code is for other devices than this one. That is no problem to print: programs try PTX next.
        if image.to_bytes().starts_with(ELF) {
            return NO_BINARY_FOR_GPU;
        }
        match LoadedModule::load(&image.to_string_lossy()) {
            // SAFETY: the caller's promise.
            Ok(loaded) => unsafe { return_value(module, Box::into_raw(Box::new(loaded)).cast()) },
            Err(status) => status,
        }
    }
    // The options are about the compiler, which there is none of.
    fn cuModuleLoadDataEx(
        module: *mut *mut c_void, image: *const c_char, _count: u32, _options: *mut c_int, _values: *mut *mut c_void
    ) {
        // SAFETY: the caller's promise.
        unsafe { cuModuleLoadData(module, image) }
    }
    // Modules are only loaded from memory.
    fn cuModuleLoad(_module: *mut *mut c_void, _file: *const c_char) { NOT_FOUND }
    // A module is kept, since its functions may still be in use.
    fn cuModuleUnload(_module: *mut c_void) { OK }
    fn cuModuleGetFunction(function: *mut *const Program, module: *mut c_void, name: *const c_char) {
        // SAFETY: made by `cuModuleLoadData`; candle's lock keeps other threads from using it.
        let loaded = unsafe { &mut *module.cast::<LoadedModule>() };
        // SAFETY: the caller's promise.
        let name = unsafe { CStr::from_ptr(name) }.to_string_lossy();
        match loaded.function(&name) {
            // SAFETY: the caller's promise.
            Ok(found) => unsafe { return_value(function, found) },
            Err(status) => status,
        }
    }
    fn cuFuncSetAttribute(_function: *const Program, attribute: c_int, value: c_int) {
        const MAX_DYNAMIC_SHARED_BYTES: c_int = 8;
        if attribute == MAX_DYNAMIC_SHARED_BYTES && value as usize > device().shared_bytes { INVALID_VALUE } else { OK }
    }
    fn cuLaunchKernel(
        function: *const Program, x: u32, y: u32, z: u32, threads_x: u32, threads_y: u32, threads_z: u32,
        shared_bytes: u32, _stream: *mut c_void, arguments: *const *const u8, _extra: *mut c_void
    ) {
        // SAFETY: made by `cuModuleGetFunction`.
        let program = unsafe { &*function };
        let threads = [threads_x, threads_y, threads_z];
        let grid = Grid { blocks: [x, y, z], threads, shared_bytes: shared_bytes as usize };
        if !is_valid(&grid, program) {
            let Grid { blocks, .. } = grid;
            problem(&format!("{}: a grid of {blocks:?} of {threads:?} with {shared_bytes} bytes", program.name));
            return INVALID_VALUE;
        }
        let mut parameters = vec![0; program.parameter_bytes()];
        for (at, (begin, bytes)) in program.parameters.iter().enumerate() {
            // SAFETY: the caller passes an argument for each parameter.
            unsafe { copy(*arguments.add(at), parameters[*begin..].as_mut_ptr(), *bytes) };
        }
        count(&program.name, 1);
        match launch(program, &parameters, grid, Schedule::current()) {
            Ok(()) => OK,
            Err(fault) => {
                problem(&format!("{}: {fault}", program.name));
                LAUNCH_FAILED
            }
        }
    }
}
