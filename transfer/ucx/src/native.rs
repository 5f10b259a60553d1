//! UCX itself. Everything here but [`Waker`] lives and dies on the thread that made the [`Worker`].
#![allow(unsafe_code)] // Calls C, which calls back; each block says why it is sound.

use std::{
    cell::Cell,
    ffi::{CStr, CString, c_char, c_void},
    io, mem,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    ptr,
    rc::Rc,
    time::{Duration, Instant},
};

use baton_arena::Arena;
use baton_ucx_sys::{self as sys, Ucp, ucs_status_t};
use bytes::Bytes;

use crate::{Lane, StartError, UcxError, command::Answer, describe, thread::Started};

/// Where the user has said nothing else. Where failing peers are to be noticed, UCX writes over tcp by
/// messages of one segment. Its own of 8 KiB cost two thirds of the speed, and 64 KiB still a third: with its
/// head a block of 64 KiB makes two messages then.
///
/// UCX 1.13 passes them over with a warning.
const SETTINGS: [(&str, &str); 2] = [("TCP_TX_SEG_SIZE", "136k"), ("TCP_RX_SEG_SIZE", "136k")];

/// How long an endpoint may take to close. Its requests are cancelled at once.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// How long what is under way may take before an endpoint that nobody holds any more is closed.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(1);

/// Wakes the thread from its sleep.
pub(crate) struct Waker(OwnedFd);

impl Waker {
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: no memory is passed.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel just gave it to us, and nobody else has it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    pub(crate) fn wake(&self) {
        let one = 1_u64.to_ne_bytes();
        // SAFETY: the buffer is as long as said. It fails only where it was woken 2^64 times.
        unsafe { libc::write(self.0.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }

    fn calm(&self) {
        let mut count = [0_u8; 8];
        // SAFETY: the buffer is as long as said. It fails where nobody woke us.
        unsafe { libc::read(self.0.as_raw_fd(), count.as_mut_ptr().cast(), count.len()) };
    }
}

/// A context and its one worker.
pub(crate) struct Worker {
    ucp: &'static Ucp,
    context: sys::ucp_context_h,
    worker: sys::ucp_worker_h,
    event_fd: RawFd,
}

impl Worker {
    pub(crate) fn new(ucp: &'static Ucp) -> Result<(Self, Started), StartError> {
        let version = version(ucp);
        let refused = |action| {
            let version = version.clone();
            move |status| StartError::Init { version, action, reason: told(ucp, status) }
        };
        let context = context(ucp).map_err(refused("make a context"))?;
        let mut params: sys::ucp_worker_params_t = zeroed();
        params.field_mask = u64::from(sys::UCP_WORKER_PARAM_FIELD_THREAD_MODE);
        params.thread_mode = sys::UCS_THREAD_MODE_SINGLE;
        let mut worker = ptr::null_mut();
        // SAFETY: the context is alive, and the fields that the mask names are set.
        let status =
            unsafe { (ucp.ucp_worker_create)(context, &raw const params, &raw mut worker) };
        if status != sys::UCS_OK {
            // SAFETY: nothing hangs on the context.
            unsafe { (ucp.ucp_cleanup)(context) };
            return Err(refused("make a worker")(status));
        }
        let mut made = Self { ucp, context, worker, event_fd: -1 };
        // SAFETY: the worker is alive, its context was made with the wake-up feature.
        let status = unsafe { (ucp.ucp_worker_get_efd)(worker, &raw mut made.event_fd) };
        checked(status).map_err(refused("wait for events"))?;
        let address = made.address().map_err(refused("tell its address"))?;
        // SAFETY: prints into the stream that it is given, of a context that is alive.
        let printed = printed(|stream| unsafe { (ucp.ucp_context_print_info)(context, stream) });
        let resources = describe::resources(&printed);
        Ok((made, Started { version, address, resources }))
    }

    fn address(&self) -> Result<Bytes, ucs_status_t> {
        let mut attr: sys::ucp_worker_attr_t = zeroed();
        attr.field_mask = u64::from(sys::UCP_WORKER_ATTR_FIELD_ADDRESS);
        // SAFETY: the worker is alive; UCX fills the fields that the mask names, and gives us an address
        // of the length that it says, which is copied before it is given back.
        unsafe {
            checked((self.ucp.ucp_worker_query)(self.worker, &raw mut attr))?;
            let address =
                std::slice::from_raw_parts(attr.address.cast::<u8>(), attr.address_length);
            let copied = Bytes::copy_from_slice(address);
            (self.ucp.ucp_worker_release_address)(self.worker, attr.address);
            Ok(copied)
        }
    }

    /// Lets UCX work. Answers whether there was anything to do.
    pub(crate) fn progress(&self) -> bool {
        // SAFETY: the worker is alive, and callbacks get only what this module gave with the requests.
        unsafe { (self.ucp.ucp_worker_progress)(self.worker) != 0 }
    }

    /// Whether the next event will be shown by the descriptor; where not, there is work already.
    pub(crate) fn arm(&self) -> bool {
        // SAFETY: the worker is alive, its context was made with the wake-up feature.
        unsafe { (self.ucp.ucp_worker_arm)(self.worker) == sys::UCS_OK }
    }

    /// Waits for an event, or to be woken.
    pub(crate) fn wait(&self, waker: &Waker, at_most: Duration) {
        let of = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let mut wanted = [of(self.event_fd), of(waker.0.as_raw_fd())];
        let timeout_ms = libc::c_int::try_from(at_most.as_millis()).unwrap_or(libc::c_int::MAX);
        // SAFETY: there are as many as said.
        unsafe { libc::poll(wanted.as_mut_ptr(), 2, timeout_ms) };
        waker.calm();
    }

    fn failed(&self, action: &'static str, status: ucs_status_t) -> UcxError {
        UcxError::Failed { action, reason: told(self.ucp, status) }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // SAFETY: whatever hangs on either holds an `Rc` of this, so nothing does any more.
        unsafe {
            (self.ucp.ucp_worker_destroy)(self.worker);
            (self.ucp.ucp_cleanup)(self.context);
        }
    }
}

fn context(ucp: &'static Ucp) -> Result<sys::ucp_context_h, ucs_status_t> {
    let mut config = ptr::null_mut();
    // SAFETY: both strings may be absent, and the configuration is released below.
    unsafe { checked((ucp.ucp_config_read)(ptr::null(), ptr::null(), &raw mut config))? };
    for (name, value) in SETTINGS {
        if std::env::var_os(format!("UCX_{name}")).is_some() {
            continue;
        }
        let (Ok(name), Ok(value)) = (CString::new(name), CString::new(value)) else { continue };
        // SAFETY: the configuration is alive, and both are C strings. A version that does not know the
        // setting does well without it.
        unsafe { (ucp.ucp_config_modify)(config, name.as_ptr(), value.as_ptr()) };
    }
    let mut params: sys::ucp_params_t = zeroed();
    params.field_mask = u64::from(sys::UCP_PARAM_FIELD_FEATURES);
    params.features = u64::from(sys::UCP_FEATURE_RMA | sys::UCP_FEATURE_WAKEUP);
    let mut context = ptr::null_mut();
    // SAFETY: the fields that the mask names are set, the version is that of the bindings.
    unsafe {
        let (major, minor) = (sys::UCP_API_MAJOR, sys::UCP_API_MINOR);
        let made =
            (ucp.ucp_init_version)(major, minor, &raw const params, config, &raw mut context);
        (ucp.ucp_config_release)(config);
        checked(made)?;
    }
    Ok(context)
}

/// Memory that peers may write into.
pub(crate) struct Memory {
    handle: sys::ucp_mem_h,
    worker: Rc<Worker>,
    /// Keeps the mapping where it is.
    arena: Arena,
}

impl Memory {
    /// Answers the key that lets a peer write into it, too.
    pub(crate) fn register(worker: Rc<Worker>, arena: Arena) -> Result<(Self, Bytes), UcxError> {
        let mut params: sys::ucp_mem_map_params_t = zeroed();
        params.field_mask =
            u64::from(sys::UCP_MEM_MAP_PARAM_FIELD_ADDRESS | sys::UCP_MEM_MAP_PARAM_FIELD_LENGTH);
        params.address = arena.base().cast();
        params.length = arena.len_bytes();
        let mut handle = ptr::null_mut();
        let ucp = worker.ucp;
        // SAFETY: the fields that the mask names are set; the range is mapped as long as `arena` lives,
        // which is longer than the handle does.
        let mapped =
            unsafe { (ucp.ucp_mem_map)(worker.context, &raw const params, &raw mut handle) };
        checked(mapped).map_err(|status| worker.failed("register the arena", status))?;
        let memory = Self { handle, worker, arena };
        let key = memory.key()?;
        Ok((memory, key))
    }

    fn key(&self) -> Result<Bytes, UcxError> {
        let (ucp, context) = (self.worker.ucp, self.worker.context);
        let (mut buffer, mut len) = (ptr::null_mut(), 0);
        // SAFETY: context and handle are alive; UCX gives a buffer of the length that it says, which is
        // copied before it is given back.
        unsafe {
            let packed = (ucp.ucp_rkey_pack)(context, self.handle, &raw mut buffer, &raw mut len);
            checked(packed).map_err(|status| self.worker.failed("pack the arena's key", status))?;
            let key = Bytes::copy_from_slice(std::slice::from_raw_parts(buffer.cast::<u8>(), len));
            (ucp.ucp_rkey_buffer_release)(buffer);
            Ok(key)
        }
    }

    /// Whether these bytes lie in it.
    pub(crate) fn holds(&self, bytes: &Bytes) -> bool {
        let begin = self.arena.base() as usize;
        let at = bytes.as_ptr() as usize;
        at >= begin && at + bytes.len() <= begin + self.arena.len_bytes()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the handle is of this context, and writes that use it hold an `Rc` of this.
        unsafe { (self.worker.ucp.ucp_mem_unmap)(self.worker.context, self.handle) };
    }
}

/// An endpoint.
pub(crate) struct Peer {
    endpoint: sys::ucp_ep_h,
    is_forcible: bool,
    worker: Rc<Worker>,
    /// Set by UCX when the peer is gone. On the heap, because UCX keeps its address.
    broken: Box<Cell<ucs_status_t>>,
}

impl Peer {
    /// With failures noticed, where any transport that is left to UCX can do so: memory shared on one
    /// host cannot.
    pub(crate) fn connect(worker: &Rc<Worker>, address: &[u8]) -> Result<Self, UcxError> {
        match Self::open(worker, address, sys::UCP_ERR_HANDLING_MODE_PEER) {
            Err(status) => {
                tracing::debug!(
                    reason = told(worker.ucp, status),
                    "no transport notices failing peers; the control connection alone will"
                );
                Self::open(worker, address, sys::UCP_ERR_HANDLING_MODE_NONE)
            }
            opened => opened,
        }
        .map_err(|status| worker.failed("connect to the peer", status))
    }

    fn open(
        worker: &Rc<Worker>,
        address: &[u8],
        mode: sys::ucp_err_handling_mode_t,
    ) -> Result<Self, ucs_status_t> {
        let broken = Box::new(Cell::new(sys::UCS_OK));
        let mut params: sys::ucp_ep_params_t = zeroed();
        params.field_mask = u64::from(
            sys::UCP_EP_PARAM_FIELD_REMOTE_ADDRESS
                | sys::UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE
                | sys::UCP_EP_PARAM_FIELD_ERR_HANDLER,
        );
        params.address = address.as_ptr().cast();
        params.err_mode = mode;
        params.err_handler.cb = Some(on_failure);
        params.err_handler.arg = ptr::from_ref::<Cell<ucs_status_t>>(&broken).cast_mut().cast();
        let mut endpoint = ptr::null_mut();
        // SAFETY: the worker is alive and the fields that the mask names are set; the cell outlives the
        // endpoint, see `Drop`. UCX checks the address's form, but trusts its lengths: it came over
        // a connection to a peer whose certificate is pinned.
        unsafe {
            let ucp = worker.ucp;
            checked((ucp.ucp_ep_create)(worker.worker, &raw const params, &raw mut endpoint))?;
        }
        let is_forcible = mode == sys::UCP_ERR_HANDLING_MODE_PEER;
        Ok(Self { endpoint, is_forcible, worker: Rc::clone(worker), broken })
    }

    pub(crate) fn import(&self, key: &[u8]) -> Result<RemoteKey, UcxError> {
        let mut rkey = ptr::null_mut();
        // SAFETY: the endpoint is alive. Of the key UCX trusts the lengths in it: it came from a peer
        // whose certificate is pinned.
        let unpacked = unsafe {
            let ucp = self.worker.ucp;
            (ucp.ucp_ep_rkey_unpack)(self.endpoint, key.as_ptr().cast(), &raw mut rkey)
        };
        checked(unpacked)
            .map_err(|status| self.worker.failed("read the key of the peer's arena", status))?;
        Ok(RemoteKey { rkey, worker: Rc::clone(&self.worker) })
    }

    pub(crate) fn lanes(&self) -> Result<Vec<Lane>, UcxError> {
        self.is_whole()?;
        let print = self.worker.ucp.ucp_ep_print_info;
        // SAFETY: prints into the stream that it is given, of an endpoint that is alive.
        let printed = printed(|stream| unsafe { print(self.endpoint, stream) });
        Ok(describe::lanes(&printed))
    }

    fn is_whole(&self) -> Result<(), UcxError> {
        let status = self.broken.get();
        checked(status).map_err(|status| self.worker.failed("reach the peer", status))
    }

    /// Writes all, each to its address at the peer, then flushes. `answer` is told when the last of them
    /// is done with.
    pub(crate) fn put(&self, key: Rc<RemoteKey>, sources: Vec<Source>, answer: Answer<()>) {
        if let Err(error) = self.is_whole() {
            drop((key, sources));
            // Whoever asked need not be there any more.
            let _ = answer.send(Err(error));
            return;
        }
        let ucp = self.worker.ucp;
        let batch = Box::into_raw(Box::new(Batch {
            open: Cell::new(1),
            failed: Cell::new(sys::UCS_OK),
            key,
            sources,
            ucp,
            answer: Cell::new(Some(answer)),
        }));
        let mut params: sys::ucp_request_param_t = zeroed();
        params.op_attr_mask = sys::UCP_OP_ATTR_FIELD_CALLBACK | sys::UCP_OP_ATTR_FIELD_USER_DATA;
        params.cb.send = Some(on_done);
        params.user_data = batch.cast();
        // SAFETY: the batch is alive until `closed` has been called once for its making and once for each
        // request that was left open, and `this` is not used after the last of them. The endpoint is
        // alive; key, bytes and their registrations are held by the batch.
        unsafe {
            let this = &*batch;
            for Source { bytes, to, memory } in &this.sources {
                let mut params = params;
                if let Some(memory) = memory {
                    params.op_attr_mask |= sys::UCP_OP_ATTR_FIELD_MEMH;
                    params.memh = memory.handle;
                }
                let (from, len) = (bytes.as_ptr().cast(), bytes.len());
                let rkey = this.key.rkey;
                let put = (ucp.ucp_put_nbx)(self.endpoint, from, len, *to, rkey, &raw const params);
                this.posted(put);
            }
            this.posted((ucp.ucp_ep_flush_nbx)(self.endpoint, &raw const params));
            Batch::closed(batch, sys::UCS_OK);
        }
    }

    /// Nothing more is to be written. What is under way may end first: over tcp the peer answers each write, and
    /// UCX there aborts its process where it finds nobody to answer any more.
    pub(crate) fn leave(self) -> Leaving {
        let ucp = self.worker.ucp;
        // SAFETY: the endpoint is alive.
        let flushed = unsafe {
            Ending::of(ucp, |params| (ucp.ucp_ep_flush_nbx)(self.endpoint, &raw const *params))
        };
        Leaving { peer: self, flushed, since: Instant::now() }
    }
}

/// An endpoint that is closed once what is under way has ended.
pub(crate) struct Leaving {
    peer: Peer,
    flushed: Rc<Ending>,
    since: Instant,
}

impl Leaving {
    pub(crate) fn may_close(&self) -> bool {
        self.flushed.is_over.get()
            || self.peer.is_whole().is_err()
            || self.since.elapsed() >= LEAVE_TIMEOUT
    }
}

/// One write: the bytes, the address in the peer's process, and the bytes' own registration if they have
/// one.
pub(crate) struct Source {
    pub(crate) bytes: Bytes,
    pub(crate) to: u64,
    pub(crate) memory: Option<Rc<Memory>>,
}

impl Drop for Peer {
    fn drop(&mut self) {
        let ucp = self.worker.ucp;
        // SAFETY: the endpoint is alive and not used after this.
        let closed = unsafe {
            Ending::of(ucp, |params| {
                if self.is_forcible {
                    params.op_attr_mask |= sys::UCP_OP_ATTR_FIELD_FLAGS;
                    params.flags = sys::UCP_EP_CLOSE_FLAG_FORCE;
                }
                (ucp.ucp_ep_close_nbx)(self.endpoint, &raw const *params)
            })
        };
        let since = Instant::now();
        while !closed.is_over.get() && since.elapsed() < CLOSE_TIMEOUT {
            self.worker.progress();
        }
        if !closed.is_over.get() {
            tracing::warn!("UCX did not close an endpoint in {CLOSE_TIMEOUT:?}");
            // UCX may still tell of a failure: the cell stays.
            mem::forget(mem::take(&mut self.broken));
        }
    }
}

/// A request of which nothing is asked but that it ends.
struct Ending {
    is_over: Cell<bool>,
    ucp: &'static Ucp,
}

impl Ending {
    /// # Safety
    /// `ask` passes the parameters on to UCX once, in a call that is sound with them.
    unsafe fn of(
        ucp: &'static Ucp,
        ask: impl FnOnce(&mut sys::ucp_request_param_t) -> sys::ucs_status_ptr_t,
    ) -> Rc<Self> {
        let ending = Rc::new(Self { is_over: Cell::new(false), ucp });
        let with_ucx = Rc::into_raw(Rc::clone(&ending));
        let mut params: sys::ucp_request_param_t = zeroed();
        params.op_attr_mask = sys::UCP_OP_ATTR_FIELD_CALLBACK | sys::UCP_OP_ATTR_FIELD_USER_DATA;
        params.cb.send = Some(on_ended);
        params.user_data = with_ucx.cast_mut().cast();
        if !is_request(ask(&mut params)) {
            ending.is_over.set(true);
            // SAFETY: UCX calls back for requests only, so that it is given back here and nowhere else.
            drop(unsafe { Rc::from_raw(with_ucx) });
        }
        ending
    }
}

/// A peer's key.
pub(crate) struct RemoteKey {
    rkey: sys::ucp_rkey_h,
    worker: Rc<Worker>,
}

impl Drop for RemoteKey {
    fn drop(&mut self) {
        // SAFETY: writes that use it hold an `Rc` of this.
        unsafe { (self.worker.ucp.ucp_rkey_destroy)(self.rkey) };
    }
}

/// Writes that were asked for together, until UCX is done with the last of them.
struct Batch {
    /// Requests that are open, and one for the batch's making.
    open: Cell<usize>,
    /// The first failure.
    failed: Cell<ucs_status_t>,
    key: Rc<RemoteKey>,
    sources: Vec<Source>,
    ucp: &'static Ucp,
    answer: Cell<Option<Answer<()>>>,
}

impl Batch {
    /// Takes what a call has answered: done, failed, or a request that will call back.
    fn posted(&self, answered: sys::ucs_status_ptr_t) {
        if is_request(answered) {
            self.open.set(self.open.get() + 1);
        } else {
            self.note(status_of(answered));
        }
    }

    fn note(&self, status: ucs_status_t) {
        if status != sys::UCS_OK && self.failed.get() == sys::UCS_OK {
            self.failed.set(status);
        }
    }

    /// One of its requests is over.
    ///
    /// # Safety
    /// `batch` came from `Box::into_raw` and this is called as often as `open` counts, and no more.
    unsafe fn closed(batch: *mut Self, status: ucs_status_t) {
        // SAFETY: it is alive before the last call.
        let this = unsafe { &*batch };
        this.note(status);
        this.open.set(this.open.get() - 1);
        if this.open.get() > 0 {
            return;
        }
        // SAFETY: this was the last call.
        let this = unsafe { Box::from_raw(batch) };
        let Self { failed, key, sources, ucp, answer, .. } = *this;
        // The bytes are let go of before it is said.
        drop((key, sources));
        let failed = failed.get();
        let said = checked(failed)
            .map_err(|status| UcxError::Failed { action: "write", reason: told(ucp, status) });
        if let Some(answer) = answer.take() {
            // Whoever asked need not be there any more.
            let _ = answer.send(said);
        }
    }
}

unsafe extern "C" fn on_done(request: *mut c_void, status: ucs_status_t, user_data: *mut c_void) {
    let batch: *mut Batch = user_data.cast();
    // SAFETY: UCX calls this once for each request that `put` left open, with the batch that it was
    // given; the request is freed here, where it is over, and nowhere else.
    unsafe {
        ((*batch).ucp.ucp_request_free)(request);
        Batch::closed(batch, status);
    }
}

unsafe extern "C" fn on_ended(request: *mut c_void, _: ucs_status_t, ending: *mut c_void) {
    // SAFETY: UCX calls this once for a request that is over, with what `Ending::of` gave it.
    unsafe {
        let ending = Rc::from_raw(ending.cast::<Ending>().cast_const());
        (ending.ucp.ucp_request_free)(request);
        ending.is_over.set(true);
    }
}

unsafe extern "C" fn on_failure(broken: *mut c_void, _: sys::ucp_ep_h, status: ucs_status_t) {
    // SAFETY: UCX calls this on the thread that makes progress, with the cell that its endpoint was made
    // with, which lives longer than the endpoint.
    unsafe { (*broken.cast::<Cell<ucs_status_t>>()).set(status) };
}

/// What `print` prints into a stream.
fn printed(print: impl FnOnce(*mut libc::FILE)) -> String {
    let (mut text, mut len) = (ptr::null_mut::<c_char>(), 0_usize);
    // SAFETY: the stream writes into memory of its own, which is ours to free once it is closed.
    unsafe {
        let stream = libc::open_memstream(&raw mut text, &raw mut len);
        if stream.is_null() {
            return String::new();
        }
        print(stream);
        libc::fclose(stream);
        let bytes = std::slice::from_raw_parts(text.cast::<u8>(), len);
        let copied = String::from_utf8_lossy(bytes).into_owned();
        libc::free(text.cast());
        copied
    }
}

fn version(ucp: &'static Ucp) -> String {
    let (mut major, mut minor, mut release) = (0, 0, 0);
    // SAFETY: it writes the three numbers.
    unsafe { (ucp.ucp_get_version)(&raw mut major, &raw mut minor, &raw mut release) };
    format!("{major}.{minor}.{release}")
}

/// UCX's own words for a status.
fn told(ucp: &'static Ucp, status: ucs_status_t) -> String {
    // SAFETY: it answers a C string that stays.
    let text = unsafe { CStr::from_ptr((ucp.ucs_status_string)(status)) };
    text.to_string_lossy().into_owned()
}

fn checked(status: ucs_status_t) -> Result<(), ucs_status_t> {
    if status == sys::UCS_OK { Ok(()) } else { Err(status) }
}

/// UCX answers either a status, squeezed into a pointer, or a request.
fn is_request(answered: sys::ucs_status_ptr_t) -> bool {
    let value = answered as isize;
    value != 0 && !(isize::from(sys::UCS_ERR_LAST)..0).contains(&value)
}

fn status_of(answered: sys::ucs_status_ptr_t) -> ucs_status_t {
    ucs_status_t::try_from(answered as isize).unwrap_or(sys::UCS_ERR_LAST)
}

/// A parameter block of which nothing is set yet.
fn zeroed<T: Parameters>() -> T {
    // SAFETY: see the trait.
    unsafe { mem::zeroed() }
}

/// # Safety
/// All zeroes are a value of the type.
unsafe trait Parameters {}

// SAFETY: integers, pointers that may be null, and optional functions.
unsafe impl Parameters for sys::ucp_params_t {}
// SAFETY: as above.
unsafe impl Parameters for sys::ucp_worker_params_t {}
// SAFETY: as above.
unsafe impl Parameters for sys::ucp_worker_attr_t {}
// SAFETY: as above.
unsafe impl Parameters for sys::ucp_ep_params_t {}
// SAFETY: as above.
unsafe impl Parameters for sys::ucp_mem_map_params_t {}
// SAFETY: as above.
unsafe impl Parameters for sys::ucp_request_param_t {}
