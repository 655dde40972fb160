// mirage_restore WEIGHTS.safetensors IN.ppm OUT.ppm: restores a photograph without Python, with the CPU library alone.
//
// `mirage export` writes the weights; images are binary pixmaps (P6) of 8 bits, of any size. The same pixels as `mirage
// restore`, which csrc/examples/check.py tests.
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

// Of a side of `size` pixels, which one stands at i: reflected beyond its end, or the last one where it is too short.
int64_t padded(int64_t i, int64_t size) {
  const int64_t pad = (8 - size % 8) % 8;
  return i < size ? i : pad < size ? 2 * (size - 1) - i : size - 1;
}

// In [0, 1], with sides that are multiples of 8.
Map read_pixmap(const std::string& path, int& height, int& width) {
  std::ifstream file(path, std::ios::binary);
  if (!file) refuse(path, "cannot be opened");
  if (file.get() != 'P' || file.get() != '6') refuse(path, "not a binary pixmap (P6)");
  width = number(file, path), height = number(file, path);
  const int most = number(file, path);
  if (most != 255) refuse(path, "expected 8 bits, got values up to " + std::to_string(most));
  file.get();
  std::vector<unsigned char> pixels(size_t(width) * size_t(height) * 3);
  if (!file.read(reinterpret_cast<char*>(pixels.data()), std::streamsize(pixels.size()))) refuse(path, "ends too soon");
  Map image(3, (height + 7) / 8 * 8, (width + 7) / 8 * 8);
  for (int64_t c = 0; c < 3; ++c) {
    for (int64_t i = 0; i < image.height; ++i) {
      for (int64_t j = 0; j < image.width; ++j) {
        const int64_t row = padded(i, height), column = padded(j, width);
        image.plane(c)[i * image.width + j] = float(pixels[size_t((row * width + column) * 3 + c)]) / 255.0f;
      }
    }
  }
  return image;
}

void write_pixmap(const std::string& path, const Map& image, int height, int width) {
  std::vector<unsigned char> pixels;
  for (int64_t i = 0; i < height; ++i) {
    for (int64_t j = 0; j < width; ++j) {
      for (int64_t c = 0; c < 3; ++c) {
        const float value = std::min(1.0f, std::max(0.0f, image.plane(c)[i * image.width + j]));
        pixels.push_back(static_cast<unsigned char>(std::nearbyint(value * 255.0f)));
      }
    }
  }
  std::ofstream file(path, std::ios::binary);
  file << "P6\n" << width << " " << height << "\n255\n";
  file.write(reinterpret_cast<const char*>(pixels.data()), std::streamsize(pixels.size()));
  if (!file.flush()) refuse(path, "cannot be written");
}

}  // namespace
}  // namespace mirage::example

int main(int count, char** arguments) {
  using namespace mirage::example;
  if (count != 4) {
    std::cerr << "usage: mirage_restore WEIGHTS.safetensors IN.ppm OUT.ppm\n";
    return 2;
  }
  try {
    const SafeTensors weights(arguments[1]);
    int height = 0, width = 0;
    const Map image = read_pixmap(arguments[2], height, width);
    write_pixmap(arguments[3], Network(weights).restore(image), height, width);
  } catch (const std::exception& error) {
    std::cerr << "mirage_restore: " << error.what() << "\n";
    return 1;
  }
  return 0;
}
