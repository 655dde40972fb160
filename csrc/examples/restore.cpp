// mirage_restore [--cuda] WEIGHTS.safetensors IN.ppm OUT.ppm: restores a photograph without Python, with the CPU
// library or, with --cuda, on a GPU with the CUDA library.
//
// `mirage export` writes the weights. Images are binary pixmaps (P6) of 8 bits, of any size. Pixels are those of
// `mirage restore` on a CPU, and on a GPU the same up to rounding; csrc/examples/check.py tests it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <iostream>

#include "network.h"

namespace mirage::example {
namespace {

[[noreturn]] void refuse(const std::string& path, const std::string& why) { throw std::runtime_error(path + ": " + why); }

int number(std::istream& file, const std::string& path) {
  while (std::isspace(file.peek()) || file.peek() == '#') {
    if (file.get() == '#') file.ignore(1 << 20, '\n');
  }
  int value = 0;
  if (!(file >> value) || value <= 0) refuse(path, "not a pixmap: no positive number in its header");
  return value;
}

// The pixel of a side of `size` pixels to use at i: reflected beyond the end, or the last one if the side is too short.
int64_t padded(int64_t i, int64_t size) {
  const int64_t pad = (8 - size % 8) % 8;
  return i < size ? i : pad < size ? 2 * (size - 1) - i : size - 1;
}

// Three planes in [0, 1].
struct Image {
  float& at(int64_t c, int64_t i, int64_t j) { return values[size_t((c * height + i) * width + j)]; }
  float at(int64_t c, int64_t i, int64_t j) const { return values[size_t((c * height + i) * width + j)]; }

  int64_t height, width;
  std::vector<float> values = std::vector<float>(size_t(3 * height * width));
};

// Reads an image, and pads its sides to multiples of 8.
Image read_pixmap(const std::string& path, int& height, int& width) {
  std::ifstream file(path, std::ios::binary);
  if (!file) refuse(path, "cannot be opened");
  if (file.get() != 'P' || file.get() != '6') refuse(path, "not a binary pixmap (P6)");
  width = number(file, path), height = number(file, path);
  const int most = number(file, path);
  if (most != 255) refuse(path, "expected 8 bits, got values up to " + std::to_string(most));
  file.get();
  std::vector<unsigned char> pixels(size_t(width) * size_t(height) * 3);
  if (!file.read(reinterpret_cast<char*>(pixels.data()), std::streamsize(pixels.size()))) refuse(path, "ends too soon");
  Image image{(height + 7) / 8 * 8, (width + 7) / 8 * 8};
  for (int64_t c = 0; c < 3; ++c) {
    for (int64_t i = 0; i < image.height; ++i) {
      for (int64_t j = 0; j < image.width; ++j) {
        const int64_t row = padded(i, height), column = padded(j, width);
        image.at(c, i, j) = float(pixels[size_t((row * width + column) * 3 + c)]) / 255.0f;
      }
    }
  }
  return image;
}

void write_pixmap(const std::string& path, const Image& image, int height, int width) {
  std::vector<unsigned char> pixels;
  for (int64_t i = 0; i < height; ++i) {
    for (int64_t j = 0; j < width; ++j) {
      for (int64_t c = 0; c < 3; ++c) {
        // In double, like Python: in float, 255 times a value can round to a half that it is not.
        const double value = std::min(1.0f, std::max(0.0f, image.at(c, i, j)));
        pixels.push_back(static_cast<unsigned char>(std::nearbyint(value * 255.0)));
      }
    }
  }
  std::ofstream file(path, std::ios::binary);
  file << "P6\n" << width << " " << height << "\n255\n";
  file.write(reinterpret_cast<const char*>(pixels.data()), std::streamsize(pixels.size()));
  if (!file.flush()) refuse(path, "cannot be written");
}

std::unique_ptr<Backend> backend(bool cuda) {
  if (!cuda) return cpu_backend();
#if defined(MIRAGE_EXAMPLE_CUDA)
  return cuda_backend();
#else
  refuse("--cuda", "this program was built without the CUDA library");
#endif
}

void restore(bool cuda, const char* const* paths) {
  const SafeTensors weights(paths[0]);
  int height = 0, width = 0;
  Image image = read_pixmap(paths[1], height, width);
  const std::unique_ptr<Backend> on = backend(cuda);
  Network network(weights, *on);
  const Map given = on->map(3, image.height, image.width);
  on->upload(image.values.data(), given);
  on->download(network.restore(given), image.values.data());
  write_pixmap(paths[2], image, height, width);
}

}  // namespace
}  // namespace mirage::example

int main(int count, char** arguments) {
  const bool cuda = count > 1 && std::string(arguments[1]) == "--cuda";
  if (count != 4 + cuda) {
    std::cerr << "usage: mirage_restore [--cuda] WEIGHTS.safetensors IN.ppm OUT.ppm\n";
    return 2;
  }
  try {
    mirage::example::restore(cuda, arguments + 1 + cuda);
  } catch (const std::exception& error) {
    std::cerr << "mirage_restore: " << error.what() << "\n";
    return 1;
  }
  return 0;
}
