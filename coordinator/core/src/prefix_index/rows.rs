//! Blocks and their holders, in pages, each as its first teller told of it: a prompt's blocks are told one after the
//! other, so that for the most part they lie one behind the other and are read as fast as memory can be.

use std::num::NonZeroU32;

use super::{holders::Holders, worker_slots::Slot};

/// Few in tests, so that there are many pages.
const PAGE_ROWS: usize = if cfg!(test) { 8 } else { 64 };

/// A page that was full is given up when so many of its rows are left; they move to another one.
const SPARSE_ROWS: usize = PAGE_ROWS / 2;

const NO_PAGE: usize = usize::MAX;

/// A block and who holds it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Row {
    /// Zero where there is none.
    pub(super) block: u64,
    pub(super) holders: Holders,
}

const NO_ROW: Row = Row { block: 0, holders: Holders::NONE };

/// Where a row lies. Holds until the row is taken out or moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place(NonZeroU32);

#[derive(Debug, Default)]
pub(super) struct Rows {
    pages: Vec<Page>,
    /// Pages without memory.
    free: Vec<usize>,
    used: usize,
    /// Where each teller's next row goes.
    tellers: Vec<Filling>,
    /// Where rows go that are moved.
    moved: Filling,
}

#[derive(Debug)]
struct Page {
    /// As long as a page, or empty.
    rows: Box<[Row]>,
    /// How many of them are in use.
    used: u8,
    /// One will be added.
    is_filling: bool,
}

#[derive(Clone, Copy, Debug)]
struct Filling {
    page: usize,
    next: usize,
}

impl Default for Filling {
    fn default() -> Self {
        Self { page: NO_PAGE, next: 0 }
    }
}

impl Place {
    fn of(page: usize, row: usize) -> Self {
        // Four billion rows are more than any memory has room for.
        let number = u32::try_from(page * PAGE_ROWS + row + 1).ok();
        Self(number.and_then(NonZeroU32::new).unwrap_or(NonZeroU32::MAX))
    }

    fn number(self) -> usize {
        self.0.get() as usize - 1
    }

    fn page(self) -> usize {
        self.number() / PAGE_ROWS
    }

    fn row(self) -> usize {
        self.number() % PAGE_ROWS
    }
}

impl Rows {
    pub(super) fn get(&self, place: Place) -> &Row {
        &self.pages[place.page()].rows[place.row()]
    }

    pub(super) fn get_mut(&mut self, place: Place) -> &mut Row {
        &mut self.pages[place.page()].rows[place.row()]
    }

    /// The rows of its page, from this one on.
    pub(super) fn following(&self, place: Place) -> &[Row] {
        &self.pages[place.page()].rows[place.row()..]
    }

    /// Where those rows of a page lie that are in use.
    pub(super) fn of_page(&self, page: usize) -> Vec<Place> {
        let rows = self.pages[page].rows.iter().enumerate();
        rows.filter(|(_, row)| row.block != 0).map(|(row, _)| Place::of(page, row)).collect()
    }

    pub(super) fn pages(&self) -> usize {
        self.pages.len()
    }

    /// Adds a block behind the last one that this teller added.
    pub(super) fn add(&mut self, teller: Slot, block: u64) -> Place {
        let teller = usize::from(teller);
        if self.tellers.len() <= teller {
            self.tellers.resize(teller + 1, Filling::default());
        }
        let (place, filling) = self.put(self.tellers[teller], Row { block, ..NO_ROW });
        self.tellers[teller] = filling;
        place
    }

    /// The teller tells no more.
    pub(super) fn ended(&mut self, teller: Slot) {
        if let Some(filling) = self.tellers.get_mut(usize::from(teller)) {
            let page = std::mem::take(filling).page;
            self.filled(page);
        }
    }

    pub(super) fn take_out(&mut self, place: Place) {
        *self.get_mut(place) = NO_ROW;
        self.used -= 1;
        let page = &mut self.pages[place.page()];
        page.used -= 1;
        if page.used == 0 && !page.is_filling {
            self.give_back(place.page());
        }
    }

    /// Where the row lies from now on.
    pub(super) fn relocate(&mut self, place: Place) -> Place {
        let row = *self.get(place);
        let (new, filling) = self.put(self.moved, row);
        self.moved = filling;
        self.take_out(place);
        new
    }

    /// Whether the rows of a page had better lie elsewhere.
    pub(super) fn is_sparse(&self, page: usize) -> bool {
        let page = &self.pages[page];
        !page.is_filling && usize::from(page.used) <= SPARSE_ROWS
    }

    /// Whether there is more to be gained by moving rows than those have that are being filled.
    pub(super) fn are_sparse(&self) -> bool {
        let in_use = self.pages.len() - self.free.len();
        let filling = self.tellers.len() + 1;
        in_use.saturating_sub(filling) * SPARSE_ROWS > self.used
    }

    pub(super) fn memory_bytes(&self) -> usize {
        (self.pages.len() - self.free.len()) * PAGE_ROWS * size_of::<Row>()
            + self.pages.capacity() * size_of::<Page>()
            + self.free.capacity() * size_of::<usize>()
            + self.tellers.capacity() * size_of::<Filling>()
    }

    fn put(&mut self, mut filling: Filling, row: Row) -> (Place, Filling) {
        if filling.page == NO_PAGE {
            filling = Filling { page: self.take_page(), next: 0 };
        }
        let Filling { page, next } = filling;
        let into = &mut self.pages[page];
        into.rows[next] = row;
        into.used += 1;
        self.used += 1;
        let place = Place::of(page, next);
        if next + 1 < PAGE_ROWS {
            return (place, Filling { page, next: next + 1 });
        }
        self.filled(page);
        (place, Filling::default())
    }

    fn take_page(&mut self) -> usize {
        let rows = vec![NO_ROW; PAGE_ROWS].into_boxed_slice();
        let fresh = Page { rows, used: 0, is_filling: true };
        if let Some(page) = self.free.pop() {
            self.pages[page] = fresh;
            return page;
        }
        self.pages.push(fresh);
        self.pages.len() - 1
    }

    fn filled(&mut self, page: usize) {
        let Some(filled) = self.pages.get_mut(page) else { return };
        filled.is_filling = false;
        if filled.used == 0 {
            self.give_back(page);
        }
    }

    fn give_back(&mut self, page: usize) {
        self.pages[page].rows = Box::default();
        self.free.push(page);
    }
}
