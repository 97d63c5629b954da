/** Find room on the canvas; plain functions without DOM. Boxes are [x, y, width, height] in canvas units. */

const overlap = ([x, y, width, height], [left, top, wide, high]) =>
  x < left + wide && left < x + width && y < top + high && top < y + height;

/** Move a box along an axis (0: to the right, 1: down) past all obstacles in its way. */
function slide(box, obstacles, gap, axis) {
  for (;;) {
    const around = box.map((value, index) => (index < 2 ? value - gap / 2 : value + gap));
    const hit = obstacles.filter((obstacle) => overlap(around, obstacle));
    if (!hit.length) return box;
    const end = Math.max(...hit.map((obstacle) => obstacle[axis] + obstacle[axis + 2]));
    box = box.with(axis, end + gap);
  }
}

/** The free place of a size that is nearest to `start`, to the right of it or below, as [x, y]. */
export function freePlace(start, size, obstacles, gap) {
  const places = [0, 1].map((axis) => slide([...start, ...size], obstacles, gap, axis).slice(0, 2));
  const distance = ([x, y]) => x - start[0] + (y - start[1]);
  return distance(places[0]) < distance(places[1]) ? places[0] : places[1];
}
