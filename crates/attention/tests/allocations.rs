//! What attention allocates, measured by a counting allocator: nothing per tile, and no more memory than its tokens
//! need.
#![allow(clippy::unwrap_used)] // A failed test says where.

use candle_core::{DType, Tensor};
use clearform_attention::{Attention, AttentionPlan, Geometry, Qkv, TokenGrid};
use clearform_ops::{ProductPrecision, TorchGenerator};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// The system allocator with counters.
struct Counting;

static CALLS: AtomicUsize = AtomicUsize::new(0);
static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all calls are forwarded to the system allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        CALLS.fetch_add(1, Relaxed);
        PEAK.fetch_max(HELD.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

struct Call {
    attention: Box<dyn Attention>,
    image: Qkv,
    text: Qkv,
    geometry: Geometry,
}

const HEADS: usize = 2;
const HEAD_DIM: usize = 16;
const TEXT: usize = 40;

impl Call {
    fn new(side: usize) -> Self {
        let plan: AttentionPlan = "clear:r=4".parse().unwrap();
        let mut generator = TorchGenerator::new(0);
        let mut random = |tokens: usize| {
            let mut noise = || generator.randn((1, tokens, HEADS, HEAD_DIM)).unwrap();
            Qkv { query: noise(), key: noise(), value: noise() }
        };
        Self {
            attention: plan.build("layer", &|_: &str| Ok(None), ProductPrecision::Full).unwrap(),
            image: random(side * side),
            text: random(TEXT),
            geometry: Geometry::new(vec![TokenGrid::new(side, side).unwrap()]),
        }
    }

    fn attend(&self) -> Tensor {
        self.attention.attend(self.image.clone(), Some(self.text.clone()), &self.geometry).unwrap().image
    }

    /// Number of allocations and peak bytes of a call, after a first one that makes the lists.
    fn counted(&self) -> [usize; 2] {
        self.attend();
        let calls = CALLS.load(Relaxed);
        let held = HELD.load(Relaxed);
        PEAK.store(held, Relaxed);
        assert_eq!(self.attend().dtype(), DType::F32);
        [CALLS.load(Relaxed) - calls, PEAK.load(Relaxed) - held]
    }
}

/// One test only, because the counters are those of the whole process.
#[test]
fn a_layer_allocates_nothing_per_tile_and_no_more_than_its_tokens_need() {
    // Each thread has its own working memory.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    let [[small_calls, _], [calls, bytes]] = [16, 96].map(|side| pool.install(|| Call::new(side).counted()));
    // 36 times the tiles. A few more allocations happen where task queues of threads grow.
    assert!(calls < small_calls + 60, "{calls} allocations, {small_calls} with a 36th of the tiles");
    let head_bytes = (96 * 96 + TEXT) * HEAD_DIM * 4;
    // Queries, keys, values and the output of all heads, packed keys and values of one head, scales and lists.
    let most = head_bytes * (4 * HEADS + 2) + head_bytes;
    assert!(bytes < most, "{bytes} bytes held at once, expected up to {most}");
}
