//! Words and arrays in a shared mapping, reached safely: bounds and alignment are checked once, when they are made.
//!
//! A word is an atomic, so any process may write it at any time without undefined behaviour; who is *meant* to write
//! it is said where it is declared (invariant 5). An array's elements are read and written as plain copies of Pod
//! values: its users state in their own headers why no two sides touch one element at a time.
#![expect(unsafe_code, reason = "pointers into a shared mapping")]

use super::Mapping;
use bytemuck::Pod;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64};

/// The place asked for does not lie inside the mapping, or is not aligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{len} bytes at offset {offset} do not fit a mapping of {size} bytes")]
pub struct OutOfMapping {
    /// Offset asked for.
    pub offset: usize,
    /// Bytes asked for.
    pub len: usize,
    /// Bytes there are.
    pub size: usize,
}

fn place(mapping: &Mapping, offset: usize, len: usize, align: usize) -> Result<*mut u8, OutOfMapping> {
    let size = mapping.len();
    let fits = offset.checked_add(len).is_some_and(|end| end <= size) && offset.is_multiple_of(align);
    if !fits {
        return Err(OutOfMapping { offset, len, size });
    }
    // SAFETY: offset + len lies inside the mapping, as just checked.
    Ok(unsafe { mapping.as_ptr().add(offset) })
}

macro_rules! word {
    ($(#[$doc:meta])* $name:ident, $atomic:ty, $len:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug)]
        pub struct $name {
            ptr: *const $atomic,
            _mapping: Arc<Mapping>,
        }

        // SAFETY: the pointer leads to an atomic in a mapping that this value keeps alive.
        unsafe impl Send for $name {}
        // SAFETY: as above; all access is atomic.
        unsafe impl Sync for $name {}

        impl $name {
            /// The word at `offset` bytes (naturally aligned).
            pub fn new(mapping: &Arc<Mapping>, offset: usize) -> Result<Self, OutOfMapping> {
                let ptr = place(mapping, offset, $len, $len)?.cast::<$atomic>().cast_const();
                Ok(Self { ptr, _mapping: Arc::clone(mapping) })
            }
        }

        impl std::ops::Deref for $name {
            type Target = $atomic;
            #[inline]
            fn deref(&self) -> &$atomic {
                // SAFETY: bounds and alignment were checked in new(); the mapping lives as long as self.
                unsafe { &*self.ptr }
            }
        }
    };
}

word!(
    /// A u32 in shared memory.
    SharedWord, AtomicU32, 4
);
word!(
    /// A u64 in shared memory.
    SharedWord64, AtomicU64, 8
);

/// `len` elements of `T` in shared memory, copied in and out whole.
#[derive(Clone, Debug)]
pub struct SharedArray<T> {
    ptr: *mut T,
    len: usize,
    _mapping: Arc<Mapping>,
    _element: PhantomData<T>,
}

// SAFETY: the pointer leads into a mapping that this value keeps alive; T is Pod, so it has no affinity to a thread.
unsafe impl<T: Pod> Send for SharedArray<T> {}

impl<T: Pod> SharedArray<T> {
    /// The array of `len` elements at `offset` bytes.
    pub fn new(mapping: &Arc<Mapping>, offset: usize, len: usize) -> Result<Self, OutOfMapping> {
        let bytes = len.checked_mul(size_of::<T>()).unwrap_or(usize::MAX);
        let ptr = place(mapping, offset, bytes, align_of::<T>())?.cast::<T>();
        Ok(Self { ptr, len, _mapping: Arc::clone(mapping), _element: PhantomData })
    }

    /// Elements.
    #[inline]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no element.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A copy of element `index`, or of the first where there is no such element.
    #[inline]
    pub fn get(&self, index: usize) -> T {
        if index >= self.len {
            debug_assert!(false, "element {index} of {}", self.len);
            return T::zeroed();
        }
        // SAFETY: index < len, so the element lies in the mapping; Pod accepts any bytes another process may have written.
        unsafe { self.ptr.add(index).read_volatile() }
    }

    /// Writes element `index`; nothing happens where there is no such element.
    #[inline]
    pub fn set(&self, index: usize, value: T) {
        if index >= self.len {
            debug_assert!(false, "element {index} of {}", self.len);
            return;
        }
        // SAFETY: index < len, so the element lies in the mapping.
        unsafe { self.ptr.add(index).write_volatile(value) }
    }

    /// Copies `values` to the elements from `first` on, as many as fit.
    pub fn set_all(&self, first: usize, values: &[T]) {
        let count = values.len().min(self.len.saturating_sub(first));
        if count == 0 {
            return;
        }
        // SAFETY: first < len because count > 0.
        let to = unsafe { self.ptr.add(first) };
        // SAFETY: count elements from `first` on lie in the mapping; `values` is ours and can't overlap a shared mapping.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), to, count) }
    }

    /// Copies the elements from `first` on into `values`, as many as there are.
    pub fn get_all(&self, first: usize, values: &mut [T]) {
        let count = values.len().min(self.len.saturating_sub(first));
        if count == 0 {
            return;
        }
        // SAFETY: first < len because count > 0.
        let from = unsafe { self.ptr.add(first) };
        // SAFETY: count elements from `first` on lie in the mapping; `values` is ours and can't overlap a shared mapping.
        unsafe { std::ptr::copy_nonoverlapping(from.cast_const(), values.as_mut_ptr(), count) }
    }
}
