// Device guard and hooks of CUDA devices that live in host memory. Loaded by guard.py into a CPU build of torch.
//
// Streams have numbers and nothing else: work is done when it is posted. Events hold a time.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <array>
#include <chrono>
#include <mutex>
#include <new>
#include <unordered_set>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

constexpr int kMostDevices = 16;
int number_of_devices = 0;
thread_local DeviceIndex current_device = 0;
thread_local std::array<c10::StreamId, kMostDevices> current_stream{};
std::atomic<c10::StreamId> last_stream{0};
void (*waited)(const char*) = nullptr;     // told of synchronizations that come through C++, as those of torch.Event

std::mutex pinned_mutex;
std::unordered_set<const void*> pinned;

double now_ms() {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

DeviceIndex checked(DeviceIndex index) {
  TORCH_CHECK(index >= 0 && index < number_of_devices, "CUDA error: invalid device ordinal ", static_cast<int>(index));
  return index;
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device device) const override {
    Device before = getDevice();
    current_device = checked(device.index());
    return before;
  }
  Device getDevice() const override { return Device(DeviceType::CUDA, current_device); }
  void setDevice(Device device) const override { current_device = checked(device.index()); }
  void uncheckedSetDevice(Device device) const noexcept override { current_device = device.index(); }
  Stream getStream(Device device) const override {
    DeviceIndex index = device.has_index() ? device.index() : current_device;
    return Stream(Stream::UNSAFE, Device(DeviceType::CUDA, index), current_stream[index]);
  }
  Stream getDefaultStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
  Stream getNewStream(Device device, int) const override { return Stream(Stream::UNSAFE, device, ++last_stream); }
  Stream getStreamFromGlobalPool(Device device, bool) const override { return getNewStream(device, 0); }
  Stream exchangeStream(Stream stream) const override {
    Stream before = getStream(stream.device());
    current_stream[stream.device_index()] = stream.id();
    return before;
  }
  void* getStreamNativeHandle(const Stream stream) const override { return reinterpret_cast<void*>(stream.id()); }
  void destroyEvent(void* event, const DeviceIndex) const noexcept override { delete static_cast<double*>(event); }
  void record(void** event, const Stream&, const DeviceIndex, const c10::EventFlag) const override {
    if (*event == nullptr) *event = new double;
    *static_cast<double*>(*event) = now_ms();
  }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override { waited("stream"); }
  void synchronizeEvent(void*) const override { waited("event"); }
  void synchronizeDevice(const DeviceIndex) const override { waited("device"); }
  double elapsedTime(void* begin, void* end, const DeviceIndex) const override {
    return *static_cast<double*>(end) - *static_cast<double*>(begin);
  }
  DeviceIndex deviceCount() const noexcept override { return static_cast<DeviceIndex>(number_of_devices); }
};

// Ordinary memory whose addresses are remembered: `is_pinned` asks for them.
struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = c10::alloc_cpu(bytes ? bytes : 1);
    std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned.insert(data);
    return {data, data, &release, Device(DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
  static void release(void* data) {
    {
      std::lock_guard<std::mutex> lock(pinned_mutex);
      pinned.erase(data);
    }
    c10::free_cpu(data);
  }
};

struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return number_of_devices > 0; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  bool hasCUDA() const override { return true; }
  DeviceIndex current_device() const override { return ::current_device; }
  DeviceIndex deviceCount() const override { return static_cast<DeviceIndex>(number_of_devices); }
  int getNumGPUs() const override { return number_of_devices; }
  void setCurrentDevice(DeviceIndex index) const override { ::current_device = checked(index); }
  DeviceIndex getCurrentDevice() const override { return ::current_device; }
  DeviceIndex exchangeDevice(DeviceIndex index) const override {
    DeviceIndex before = ::current_device;
    ::current_device = checked(index);
    return before;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override { return exchangeDevice(index); }
  bool isPinnedPtr(const void* data) const override {
    std::lock_guard<std::mutex> lock(pinned_mutex);
    return pinned.count(data) > 0;
  }
  at::Allocator* getPinnedMemoryAllocator() const override {
    static PinnedAllocator allocator;
    return &allocator;
  }
  void deviceSynchronize(DeviceIndex) const override { waited("device"); }
};

}  // namespace

extern "C" {

// torch made its hooks object when it was imported, and both classes have no members: ours is constructed in its place.
void simulated_install(int devices, void (*on_wait)(const char*)) {
  static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface));
  number_of_devices = devices;
  waited = on_wait;
  c10::impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)].store(new Guard());
  new (const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())) Hooks();
}

int simulated_device() { return current_device; }
void simulated_set_device(int index) { current_device = static_cast<DeviceIndex>(index); }
int64_t simulated_stream(int device) { return current_stream[device]; }

}  // extern "C"
